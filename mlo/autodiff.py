"""Partial derivatives inside a backward pass, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlo.reverse_pass import gradients
from mlo.stage_function import StageFunction, leaves
from mlo.vectors import Vector


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
