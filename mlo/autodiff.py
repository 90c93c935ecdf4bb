"""Partial derivatives inside a backward pass, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlo.reverse_pass import reverse_pass
from mlo.stage_function import StageFunction, leaves
from mlo.vectors import Vector


def gradients(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Tensor | None, ...]:
    """Return Σ ∂outputsᵢ/∂inputs · cotangentsᵢ, `None` where there is no dependence at all.

    Without cotangents the outputs are scalars, and their cotangents 1. Unlike `torch.autograd.grad` it accepts outputs
    that are `None` or constant and inputs that need no gradient: a loss that is linear or constant in an argument
    leaves such holes.
    """
    live = [o for o in outputs if o is not None and o.requires_grad]
    wanted = [t for t in inputs if t.requires_grad]
    if not live or not wanted:
        return (None,) * len(inputs)
    if cotangents is not None and len(live) < len(outputs):
        pairs = zip(cotangents, outputs, strict=True)
        cotangents = [c for c, o in pairs if o is not None and o.requires_grad]
    weights = None if cotangents is None else tuple(cotangents)
    found = reverse_pass(tuple(live), tuple(wanted), weights, create_graph=create_graph, retain_graph=retain_graph)
    for t in found:
        if t is not None and t.is_sparse:
            found = tuple([t if t is None or not t.is_sparse else t.to_dense() for t in found])
            break
    if len(found) == len(inputs):
        return found
    given = iter(found)
    return tuple([next(given) if t.requires_grad else None for t in inputs])


def filled(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Vector:
    """Return `tensors` with zeros in the place of `None`."""
    return tuple(torch.zeros_like(b) if a is None else a for a, b in zip(tensors, like, strict=True))


@dataclass(frozen=True)
class Point:
    """Where a stage is evaluated: the first `n_solution` tensors are θ, the next `n_inputs` are x."""

    stage: StageFunction
    n_solution: int
    n_inputs: int

    def split(self, tensors: Sequence[Tensor]) -> tuple[Vector, Vector, Vector]:
        """Return θ, x and what follows them."""
        end = self.n_solution + self.n_inputs
        return tuple(tensors[: self.n_solution]), tuple(tensors[self.n_solution : end]), tuple(tensors[end:])


Stationarity = Callable[[], Sequence[Tensor | None]]

# Takes the function that evaluates g = ∂L/∂θ, then θ, x, further tensors, and whether its result must be
# differentiable; returns tensors.
PartialDerivative = Callable[[Stationarity, Vector, Vector, Vector, bool], Vector]


def evaluate_isolated(derivative: PartialDerivative, point: Point, *tensors: Tensor) -> Vector:
    """Return `derivative` at θ, x as one autograd node that can be differentiated any number of times.

    `tensors` are θ, x and the derivative's further arguments. The derivative is taken on fresh leaves, so
    that `torch.autograd.grad` inside it sees partial derivatives only, whatever the history of θ and x.
    The node's backward is again such a node, of the vector–Jacobian product. Each pass evaluates the
    loss once.
    """
    return _Isolated.apply(derivative, point, *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _Isolated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, derivative: PartialDerivative, point: Point, *tensors: Tensor) -> Vector:
        ctx.derivative, ctx.point = derivative, point
        ctx.save_for_backward(*tensors)
        return _at_fresh_leaves(derivative, point, tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inner, point = ctx.derivative, ctx.point
        tensors: Vector = ctx.saved_tensors
        further = len(tensors) - point.n_solution - point.n_inputs

        def vjp(
            stationarity: Stationarity, solution: Vector, inputs: Vector, rest: Vector, create_graph: bool
        ) -> Vector:
            outputs = inner(stationarity, solution, inputs, rest[:further], True)
            at = (*solution, *inputs, *rest[:further])
            return filled(gradients(outputs, at, rest[further:], create_graph=create_graph), at)

        return None, None, *evaluate_isolated(vjp, point, *tensors, *cotangents)


def _at_fresh_leaves(derivative: PartialDerivative, point: Point, tensors: Sequence[Tensor]) -> Vector:
    solution, inputs, further = point.split(tensors)
    # θ is always differentiated; of the rest only what needs it, so that constants cost nothing.
    solution = leaves(solution)
    inputs = leaves(inputs, [t.requires_grad for t in inputs])
    further = leaves(further, [t.requires_grad for t in further])
    with torch.enable_grad(), point.stage.evaluation(solution, inputs) as evaluate:
        outputs = derivative(lambda: point.stage.gradient(evaluate(), solution), solution, inputs, further, False)
    return tuple(t.detach() for t in outputs)
