"""Looking for operations in the autograd graph of a loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from mlo.errors import EvaluationError


@once_differentiable
def _example(ctx: Any) -> None:
    """Something that the decorator has wrapped."""


# All functions that the decorator wraps share the code of its wrapper.
_WRAPPER = getattr(_example, "__code__", None)


def operations(loss: Tensor) -> Iterator[Any]:
    """Yield the nodes of the graph that leads to `loss`, each once."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [following for following, _ in node.next_functions]


def reject_reentrant_checkpoints(loss: Tensor, title: str) -> None:
    """Raise an error if the graph holds a checkpoint that a backward pass to given inputs leaves out."""
    if any(node.name() == "CheckpointFunctionBackward" for node in operations(loss)):
        raise EvaluationError(
            f"{title} uses torch.utils.checkpoint with use_reentrant=True, whose parameters are unknown to autograd, "
            "so that their gradients would be lost; expected checkpoint(..., use_reentrant=False)."
        )


def reject_first_order_operations(loss: Tensor, title: str, method: str) -> None:
    """Raise an error if the graph holds an operation whose second derivative autograd takes for zero.

    Torch raises an error of its own for a `once_differentiable` backward, but only where the gradient that arrives
    there depends on a parameter; otherwise it silently counts the operation's gradient as a constant.
    """
    for node in operations(loss):
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if backward is not None and getattr(backward, "__code__", None) is _WRAPPER:
            name = node._forward_cls.__name__
            raise no_second_derivative(title, method, f"{name} is marked once_differentiable")


def no_second_derivative(title: str, method: str, reason: str) -> EvaluationError:
    """Return the error for a loss that cannot be differentiated twice."""
    return EvaluationError(
        f"{title} uses an operation without the second derivative that {method} needs (torch: {reason}). Use "
        "mlo.FiniteDifference(), or the option product=mlo.CentralDifferences(), which need first derivatives only; or "
        "for attention, inside the loss, torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
    )
