"""Who else refers to the memory of a tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# How many refer to a storage. It is no public name: where it is missing, memory counts as shared.
_COUNT = getattr(torch._C, "_storage_Use_Count", None)
# The tensor itself, and the storage object that is made to ask.
_ALONE = 2


def alone(tensor: Tensor) -> bool:
    """Return whether a tensor can be written to without changing another one.

    Torch's gradients can not always: those in `a` and `b` of `a[None] + b[None]` are views of one tensor, and a second
    backward pass that adds to both of them in place adds twice.
    """
    if _COUNT is None or tensor.layout is not torch.strided or type(tensor) is not Tensor:
        return False
    storage = tensor.untyped_storage()
    # Memory that torch has not allocated itself (NumPy's) cannot be resized.
    return _COUNT(storage._cdata) <= _ALONE and storage.resizable()


def separate_gradients(parameters: Iterable[Tensor]) -> None:
    """Give each `.grad` memory of its own."""
    for p in parameters:
        if p.grad is not None and not alone(p.grad):
            p.grad = p.grad.clone()


def laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """Return a gradient in memory of its own, laid out like the parameter, as autograd leaves it in `.grad`.

    Compiled code may hand out an expanded number, or one tensor twice.
    """
    if gradient.layout is not torch.strided:
        return gradient
    if alone(gradient) and gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like).copy_(gradient)
