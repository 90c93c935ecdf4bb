"""Derivatives of a loss that one compiled function gives: the passes that `torch.compile` traces together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.vectors import Vector

Found = tuple[Tensor | None, ...]
#: What a loss function has returned, without a graph; the derivatives; and whether the loss reaches what it is to.
Traced = tuple[Any, Found, bool]


class Derivatives(NamedTuple):
    """What is wanted of a loss beside its value.

    Attributes:
        traced: `traced(function, batch, *arguments)` evaluates `function(batch)` and forms them.
        arguments: see there.
        kind: what a function is compiled for: one for all shapes would be compiled for any shape.

    """

    traced: Callable[..., Traced]
    arguments: tuple[Any, ...]
    kind: Hashable


def gradient(at: Vector) -> Derivatives:
    """Return ∂L/∂at as what is wanted, `None` where the loss does not reach."""
    return Derivatives(_gradient, (at,), (_gradient, shapes(at)))


def mixed_product(at: Vector, x: Vector, vector: Vector, *, gradient_too: bool) -> Derivatives:
    """Return vᵀ ∂²L/∂at∂x as what is wanted; after ∂L/∂at, if that is wanted too."""
    traced = _gradient_and_mixed_product if gradient_too else _mixed_product
    return Derivatives(traced, (at, x, vector), (traced, shapes(at), shapes(x)))


def shapes(tensors: Vector) -> tuple[torch.Size, ...]:
    """Return what one function is compiled for."""
    return tuple([t.shape for t in tensors])


def _gradient(function: Callable[[Any], Any], batch: Any, at: Vector) -> Traced:
    result = function(batch)
    found = slopes((loss_of(result),), at)
    return detached(result), found, reaches(found)


def _mixed_product(function: Callable[[Any], Any], batch: Any, at: Vector, x: Vector, vector: Vector) -> Traced:
    # None of what only the gradient needs is computed.
    result, found, reached = _gradient_and_mixed_product(function, batch, at, x, vector)
    return result, found[len(at) :], reached


def _gradient_and_mixed_product(
    function: Callable[[Any], Any], batch: Any, at: Vector, x: Vector, vector: Vector
) -> Traced:
    result = function(batch)
    g = slopes((loss_of(result),), at, create_graph=True)
    mixed = slopes(g, x, vector)
    return detached(result), (*[None if t is None else t.detach() for t in g], *mixed), reaches(g)


def numbers_as_tensors(numbers: Sequence[float], like: Sequence[Tensor]) -> Vector:
    """Return one tensor for each number, in single precision at least; as numbers they would be taken for constants."""
    return tuple([t.new_tensor(number, dtype=wide(t.dtype)) for number, t in zip(numbers, like, strict=True)])


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers are multiplied: single precision at least."""
    return dtype if dtype.itemsize > 2 else torch.float32


def times(number: Tensor, t: Tensor) -> Tensor:
    """Return number·t in the dtype of t, where neither is rounded before."""
    return (number * t.to(number.dtype)).to(t.dtype)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return a·b over all entries: summed up in single precision at least, and over the tensors in double."""
    products = [x.to(wide(x.dtype)) * y.to(wide(y.dtype)) for x, y in zip(a, b, strict=True)]
    return torch.stack([p.sum().double() for p in products]).sum()


def length(vector: Sequence[Tensor]) -> Tensor:
    """Return ‖vector‖ by squares in double precision, whose range is that of all dtypes but its own."""
    doubles = [t.double() for t in vector]
    return inner(doubles, doubles).sqrt()


def write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write `values` to tensors that a loss sees."""
    with torch.no_grad():
        for t, value in zip(tensors, values, strict=True):
            t.copy_(value)


def slopes(
    outputs: Found,
    at: Vector,
    vector: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> Found:
    """Return what `reverse_pass.gradients` does where all of `at` need one, in terms that torch.compile can trace."""
    live: list[Tensor] = []
    cotangents: list[Tensor] = []
    for i, output in enumerate(outputs):
        if output is not None and output.requires_grad:
            live.append(output)
            if vector is not None:
                cotangents.append(vector[i])
    if not live:
        return (None,) * len(at)
    return torch.autograd.grad(
        live, at, cotangents or None, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
    )


def reaches(found: Sequence[Tensor | None]) -> bool:
    """Whether any of what was found is there."""
    return any(t is not None for t in found)


class UnfitLossError(Exception):
    """What a loss function has returned is no loss; to evaluate it as it is raises the error that says why."""


def loss_of(result: Any) -> Tensor:
    """Return the loss from what a loss function has returned.

    Raises:
        UnfitLossError: it is not a real number.

    """
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise UnfitLossError
    return loss


def unlogged_loss_of(result: Any) -> Tensor:
    """Return the loss where nothing else is wanted of what a loss function has returned.

    Raises:
        UnfitLossError: it is not a real number, or what is to be logged beside it is none.

    """
    if isinstance(result, Mapping):
        for value in result.values():
            if not (isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)):
                raise UnfitLossError
    return loss_of(result)


def detached(result: Any) -> Any:
    """Return what a loss function has returned, without a graph."""
    if isinstance(result, Mapping):
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in result.items()}
    return result.detach()
