"""A penalty in the place of the inverse Hessian: first derivatives only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.autodiff import filled
from mlo.hypergradient.base import HypergradientMethod
from mlo.hypergradient.first_order import first_order_only
from mlo.hypergradient.scaling import Scale, is_scale, scale_factors
from mlo.options import is_count, is_number
from mlo.products.directional import loss_gradients, shift_length
from mlo.stage_function import StageFunction, leaves
from mlo.status import SolveReport, Status
from mlo.vectors import Vector, differences, norm


@dataclass(frozen=True)
class F2SA(HypergradientMethod):
    """c ↦ μ [∂L/∂x(y, x) − ∂L/∂x(θ, x)], where y = argmin over y of L(y, x) + cᵀy/μ.

    y is the solution of the stage under a small share of the upper loss, of which c is the gradient at θ. To first
    order in 1/μ it is θ − H⁻¹c/μ, so that the difference is −Gᵀ H⁻¹ c with an error of order 1/μ. y is found by `steps`
    gradient steps from θ,

        y ← y − S (∂L/∂θ(y, x) − ∂L/∂θ(θ, x) + c/μ),

    where the second term keeps θ in place if it is not quite solved. They converge where every eigenvalue of H is in
    (0, 2/scale), by a factor of max |1 − scale·eigenvalue| per step; H is taken for symmetric. For a quadratic loss the
    result is that of `Neumann(terms=steps, scale=scale)`, without a second derivative.

    Args:
        multiplier: μ. `None`: such that ‖c‖/μ is the length of the shift that `CentralDifferences` chooses; the papers
            let a number grow in the course of the training.
        steps: gradient steps for y, at least 1.
        scale: their step size, or `None` for the learning rate of each parameter group of the stage.
        on_breakdown: see `HypergradientMethod`. Breaks down where the steps diverge and on non-finite values.

    Raises:
        ConfigurationError: an option is out of range; or a nested graph needs a derivative of this method.

    Cost: no Hessian–vector product; `steps` + 1 forward and reverse passes. Memory: that of one training step, and up
    to eight vectors of the stage's size. No second derivative.

    Source: Kwon, Kwon, Wright and Nowak, "A fully first-order method for stochastic bilevel optimization" (F2SA), ICML
    2023; Ye, Liu, Wright, Stone and Liu, "BOME! Bilevel optimization made easy", NeurIPS 2022, for the same penalty.

    >>> import mlo, torch
    >>> def loss(w, x):
    ...     return w**2 - w * x
    >>> x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    >>> w = mlo.best_response(loss, x.detach() / 2, x, mlo.F2SA(steps=3, scale=0.25))
    >>> round(torch.autograd.grad(w, x)[0].item(), 6)     # (1 + 1/2 + 1/4) / 4
    0.4375

    """

    multiplier: float | None = None
    steps: int = 10
    scale: Scale = None

    differentiable: ClassVar[bool] = False
    allows_internal_responses: ClassVar[bool] = False
    #: The steps form H·v, and the answer is −Gᵀ H⁻¹ c.
    assumes_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.multiplier is not None and (not is_number(self.multiplier) or self.multiplier <= 0):
            raise self.option_error("multiplier", "a positive number, or None for a choice by dtype")
        if not is_count(self.steps):
            raise self.option_error("steps", "an integer of at least 1")
        if not is_scale(self.scale):
            raise self.option_error("scale", "a positive number, or None for the stage's learning rate")

    @property
    def needs_learning_rate(self) -> bool:
        """Whether the scale is the stage's learning rate."""
        return self.scale is None

    def pullback(
        self,
        stage: StageFunction,
        cotangents: Sequence[Tensor],
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return the scaled difference of the gradients in x."""
        with torch.no_grad():
            result = self._difference(stage, tuple(cotangents), tuple(solution), leaves(inputs, needed))
        return first_order_only(self, stage, result, (*cotangents, *solution, *inputs))

    def _difference(
        self, stage: StageFunction, cotangents: Vector, solution: Vector, x: Vector
    ) -> tuple[Tensor | None, ...]:
        length = norm(cotangents)
        if length == 0 or not math.isfinite(length):
            status = Status.APPROXIMATE if length == 0 else Status.NON_FINITE
            self.settle(stage, SolveReport(stage.name, type(self).__name__, status, 0, None, 0))
            return tuple(torch.full_like(t, length) if t.requires_grad else None for t in x)
        multiplier = self.multiplier or length / shift_length(solution)
        here = loss_gradients(stage, leaves(solution), x)
        offset, growth = self._offset(
            stage, [c / multiplier for c in cotangents], solution, leaves(x, False), here.theta
        )
        there = loss_gradients(stage, _moved(stage, solution, offset), x)
        result = differences(there.x, here.x, multiplier)
        status = Status.DIVERGED if growth > _HOPELESS else Status.APPROXIMATE
        if not math.isfinite(norm([t for t in result if t is not None])):
            status = Status.NON_FINITE
        distance = norm([g for g in stage.stationarity(here.theta, solution) if g is not None])
        self.settle(stage, SolveReport(stage.name, type(self).__name__, status, self.steps, None, 0, distance))
        return result

    def _offset(
        self,
        stage: StageFunction,
        push: Sequence[Tensor],
        solution: Vector,
        x: Vector,
        here: Sequence[Tensor | None],
    ) -> tuple[Vector, float]:
        """Return y − θ (with the stage's signs), and how much the gradient of what y minimises has grown."""
        factors = scale_factors(self, self.scale, stage)
        each = factors if isinstance(factors, tuple) else (factors,) * len(solution)
        first = norm([p for p, g in zip(push, here, strict=True) if g is not None])
        offset: Vector = tuple(torch.zeros_like(t) for t in solution)
        residual, growth = list(push), 1.0
        for step in range(self.steps):
            if step > 0:
                found = loss_gradients(stage, leaves(_moved(stage, solution, offset)), x).theta
                changes = filled(differences(found, here, 1.0), solution)
                residual = [
                    change + decay * v + p
                    for change, v, p, decay in zip(changes, offset, push, stage.weight_decays, strict=True)
                ]
                growth = norm([r for r, g in zip(residual, here, strict=True) if g is not None]) / first
            # What the loss does not reach takes no part.
            offset = tuple(
                v if g is None else v - f * r for v, r, f, g in zip(offset, residual, each, here, strict=True)
            )
        return offset, growth


_HOPELESS = 1e3


def _moved(stage: StageFunction, solution: Vector, offset: Vector) -> Vector:
    return tuple(t + sign * v for t, v, sign in zip(solution, offset, stage.signs, strict=True))
