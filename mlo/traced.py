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
    return Derivatives(_gradient, (at,), (_gradient, _shapes(at)))


def mixed_product(at: Vector, x: Vector, vector: Vector, *, gradient_too: bool) -> Derivatives:
    """Return vᵀ ∂²L/∂at∂x as what is wanted; after ∂L/∂at, if that is wanted too."""
    traced = _gradient_and_mixed_product if gradient_too else _mixed_product
    return Derivatives(traced, (at, x, vector), (traced, _shapes(at), _shapes(x)))


def difference(at: Vector, shifted: Vector, centre: Vector) -> Derivatives:
    """Return as what is wanted ∂L/∂at less ∂L/∂at where `shifted` is reflected in `centre`, and then the loss there.

    `shifted` are parameters that the loss sees. Afterwards they are the reflection.
    """
    return Derivatives(_difference, (at, shifted, centre), (_difference, _shapes(at), _shapes(shifted)))


class Solve(NamedTuple):
    """A solve Hᵀλ = c with H = ∂g/∂θ and g = ∂L/∂θ + decay·θ.

    Attributes:
        rhs: c, one tensor for each of θ.
        decays: one number for each of θ, or none where all are zero.
        run: see `Recurrence`.
        steps: likewise.
        factors: likewise.

    """

    rhs: Vector
    decays: Vector
    run: Callable[..., Any]
    steps: int
    factors: Vector


def solve(theta: Vector, x: Vector, given: Solve) -> Derivatives:
    """Return Gᵀλ with G = ∂g/∂x as what is wanted, and then the numbers of the solve, one row of them for each step.

    The last row is ‖g‖². The loss must reach all of θ.
    """
    kind = _solve, given.run, given.steps, _shapes(theta), _shapes(x)
    return Derivatives(_solve, (theta, x, *given), kind)


def _shapes(tensors: Vector) -> tuple[torch.Size, ...]:
    return tuple([t.shape for t in tensors])


def _gradient(function: Callable[[Any], Any], batch: Any, at: Vector) -> Traced:
    result = function(batch)
    slopes = _slopes((_loss(result),), at)
    return _detached(result), slopes, _any(slopes)


def _mixed_product(function: Callable[[Any], Any], batch: Any, at: Vector, x: Vector, vector: Vector) -> Traced:
    # None of what only the gradient needs is computed.
    result, found, reached = _gradient_and_mixed_product(function, batch, at, x, vector)
    return result, found[len(at) :], reached


def _gradient_and_mixed_product(
    function: Callable[[Any], Any], batch: Any, at: Vector, x: Vector, vector: Vector
) -> Traced:
    result = function(batch)
    slopes = _slopes((_loss(result),), at, create_graph=True)
    mixed = _slopes(slopes, x, vector)
    return _detached(result), (*[None if t is None else t.detach() for t in slopes], *mixed), _any(slopes)


def _difference(function: Callable[[Any], Any], batch: Any, at: Vector, shifted: Vector, centre: Vector) -> Traced:
    result = function(batch)
    ahead = _slopes((_loss(result),), at)
    with torch.no_grad():
        for t, c in zip(shifted, centre, strict=True):
            t.copy_(c + (c - t))
    there = _loss(function(batch))
    pairs = zip(ahead, _slopes((there,), at), strict=True)
    changes = [None if a is None or b is None else a - b for a, b in pairs]
    return _detached(result), (*changes, there.detach()), _any(ahead)


def _solve(
    function: Callable[[Any], Any],
    batch: Any,
    theta: Vector,
    x: Vector,
    rhs: Vector,
    decays: Vector,
    run: Any,
    steps: int,
    factors: Vector,
) -> Traced:
    result = function(batch)
    slopes = _slopes((_loss(result),), theta, create_graph=True)
    live = [t for t in slopes if t is not None]
    if len(live) < len(theta):
        return _detached(result), slopes, False

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        found = _slopes(slopes, theta, vector, retain_graph=True)
        curved = [
            torch.zeros_like(t) if f is None else f.to_dense() if f.is_sparse else f
            for f, t in zip(found, theta, strict=True)
        ]
        if not decays:
            return curved
        return [c + times(d, v) for c, d, v in zip(curved, decays, vector, strict=True)]

    adjoint, rows = run(product, rhs, steps, factors)
    g = [t.detach() for t in live]
    if decays:
        g = [t + times(d, p.detach()) for t, d, p in zip(g, decays, theta, strict=True)]
    numbers = torch.stack([number for row in [*rows, [inner(g, g)]] for number in row])
    return _detached(result), (*_slopes(slopes, x, adjoint), numbers), True


def numbers_as_tensors(numbers: Sequence[float], like: Sequence[Tensor]) -> Vector:
    """Return one tensor for each number, in single precision at least; as numbers they would be taken for constants."""
    return tuple(
        [
            t.new_tensor(number, dtype=t.dtype if t.dtype.itemsize > 2 else torch.float32)
            for number, t in zip(numbers, like, strict=True)
        ]
    )


def times(number: Tensor, t: Tensor) -> Tensor:
    """Return number·t in the dtype of t, where neither is rounded before."""
    return (number * t.to(number.dtype)).to(t.dtype)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return a·b over all entries: summed up in single precision at least, and over the tensors in double."""
    wide = [(x, y) if x.dtype.itemsize > 2 else (x.float(), y.float()) for x, y in zip(a, b, strict=True)]
    return torch.stack([(x * y).sum().double() for x, y in wide]).sum()


def _slopes(
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


def _any(found: Found) -> bool:
    return any(t is not None for t in found)


def _loss(result: Any) -> Tensor:
    return result["loss"] if isinstance(result, Mapping) else result  # type: ignore[no-any-return]


def _detached(result: Any) -> Any:
    if isinstance(result, Mapping):
        return {key: value.detach() if isinstance(value, Tensor) else value for key, value in result.items()}
    return result.detach()
