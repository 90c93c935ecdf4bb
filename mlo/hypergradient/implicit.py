"""The implicit function theorem with a pluggable inverse, differentiable any number of times."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.autodiff import Point, Stationarity, evaluate_isolated, filled
from mlo.errors import ConfigurationError
from mlo.hypergradient.base import HypergradientMethod
from mlo.hypergradient.first_order import first_order_only
from mlo.linear_system import LinearSystem
from mlo.products import DoubleBackward, Product
from mlo.recurrence import Recurrence
from mlo.reverse_pass import gradients
from mlo.stage_function import StageFunction
from mlo.status import SolveReport, Status
from mlo.traced_pullback import TracedPullback, TracedSolve
from mlo.vectors import SAFE_LENGTHS, Vector, norm, scale, scaled


@dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes:
        vector: λ, one tensor for each of `system.rhs`.
        status: how the solve ended.
        iterations: steps of the solver.
        relative_residual: ‖c − Hλ‖ / ‖c‖, or `None` where it is not formed.

    """

    vector: Vector
    status: Status
    iterations: int
    relative_residual: float | None


@dataclass(frozen=True)
class ImplicitMethod(HypergradientMethod):
    """A method that solves Hᵀ λ = c and returns −Gᵀ λ.

    A subclass implements `solve`, and nothing else.

    Args:
        product: how the products with H and G are formed: `DoubleBackward()` (the default), `ForwardOverReverse()` or
            `CentralDifferences()`. The last two cannot be differentiated again, and are refused at stages of a nested
            graph that need it.
        on_breakdown: see `HypergradientMethod`.

    When the result is differentiated in its turn (a stage above whose loss contains this response), the
    derivative of λ = H⁻ᵀ c is λ' = H⁻ᵀ (c' − H'ᵀ λ): another solve by the same method, with the
    transposed operator. It is the derivative of the *exact* solution; for a truncated solve that is a
    convention, exact at convergence.
    """

    product: Product = field(default=DoubleBackward(), kw_only=True)

    hands_over: ClassVar[bool] = True
    #: Whether the solver takes H for symmetric; it then never sees the transposed operator.
    assumes_symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not isinstance(self.product, Product):
            raise self.option_error("product", "DoubleBackward(), ForwardOverReverse() or CentralDifferences()")

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """Whether the backward rule can itself be differentiated."""
        return self.product.differentiable

    @property
    def needs_second_derivatives(self) -> bool:
        """Whether every operation of the stage's loss must have a second derivative."""
        return isinstance(self.product, DoubleBackward)

    @property
    def allows_internal_responses(self) -> bool:  # type: ignore[override]
        """Whether the stage's own loss may contain responses that depend on the stage."""
        return self.product.differentiable

    @abstractmethod
    def solve(self, system: LinearSystem) -> Solution:
        """Return λ with Hᵀ λ ≈ c, from `system.rhs` and `system.product`."""

    def pullback(
        self,
        stage: StageFunction,
        cotangents: Sequence[Tensor],
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return −Gᵀ H⁻ᵀ c."""
        if torch.is_grad_enabled() and self.differentiable:
            return self._differentiable_pullback(stage, cotangents, solution, inputs)
        size = norm(cotangents)
        factor = normalising_factor(size)
        with torch.set_grad_enabled(False), self.product.linearised(stage, solution, inputs, needed) as linearisation:
            rhs = cotangents if factor == 1.0 else scale(cotangents, factor)
            key = _warm_start_key(stage)
            system = LinearSystem(stage, linearisation, solution, rhs, warm_start_key=key, cotangent_norm=size * factor)
            adjoint = self.solve_and_settle(stage, system)
            mixed = linearisation.mixed_product(adjoint)
        return first_order_only(self, stage, scaled(mixed, -1 / factor), (*cotangents, *solution, *inputs))

    def recurrence(self) -> Recurrence | None:
        """Return the solver as arithmetic of a known length, if it is that; a subclass of it is not."""
        return None

    def traced_pullback(self) -> TracedPullback | None:
        """Return the solve and the mixed product, if both are arithmetic of a known length."""
        recurrence = self.recurrence() if type(self.product) is DoubleBackward else None
        return None if recurrence is None else TracedSolve(recurrence)

    def _differentiable_pullback(
        self, stage: StageFunction, cotangents: Sequence[Tensor], solution: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        point = Point(stage, len(solution), len(inputs))
        adjoint = _Solve.apply(self, point, False, *solution, *inputs, *cotangents)  # type: ignore[no-untyped-call]
        mixed = evaluate_isolated(_mixed_product, point, *solution, *inputs, *adjoint)
        return tuple(m.neg() if m.is_floating_point() else m for m in mixed)

    def _checked(self, result: object, system: LinearSystem) -> Solution:
        """Return what `solve` returned, if it is what `solve` must return."""
        if isinstance(result, Solution) and [t.shape for t in result.vector] == [t.shape for t in system.rhs]:
            return result
        expected = [tuple(t.shape) for t in system.rhs]
        got = [tuple(t.shape) for t in result.vector] if isinstance(result, Solution) else type(result).__name__
        raise ConfigurationError(
            f"{type(self).__name__}.solve at stage {system.name!r}: expected an mlo.Solution whose vector has the "
            f"shapes of system.rhs, {expected}; got {got}."
        )

    def solve_and_settle(self, stage: StageFunction, system: LinearSystem) -> Vector:
        """Solve, keep λ for a warm start unless it broke down, record the report and apply the policy."""
        with torch.set_grad_enabled(False):
            result = self._checked(self.solve(system), system)
            distance = gradient_norm(system.gradient) if is_read(stage, result.status) else None
        report = SolveReport(
            stage=stage.name,
            method=type(self).__name__,
            status=result.status,
            iterations=result.iterations,
            relative_residual=result.relative_residual,
            products=system.products,
            gradient_norm=distance,
        )
        if self.keeps_solutions:
            if result.status.ok:
                system.keep(result.vector)
            else:
                system.forget()
        self.settle(stage, report)
        return result.vector


class _Solve(torch.autograd.Function):
    """λ(c, θ, x) = H⁻ᵀ c as an autograd node (H⁻¹ c where `transposed`)."""

    @staticmethod
    def forward(ctx: Any, method: ImplicitMethod, point: Point, transposed: bool, *tensors: Tensor) -> Vector:
        solution, inputs, cotangents = point.split(tensors)
        factor = normalising_factor(norm(cotangents))
        wanted = [False] * len(inputs)
        with method.product.linearised(point.stage, solution, inputs, wanted) as linearisation:
            system = LinearSystem(
                point.stage,
                linearisation,
                solution,
                scale(cotangents, factor),
                transposed=transposed and not method.assumes_symmetric,
                warm_start_key=_warm_start_key(point.stage),
            )
            adjoint = scale(system.all_parameters(method.solve_and_settle(point.stage, system)), 1 / factor)
        ctx.method, ctx.point, ctx.transposed = method, point, transposed
        ctx.save_for_backward(*solution, *inputs, *adjoint)
        return adjoint

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        method, point = ctx.method, ctx.point
        solution, inputs, adjoint = point.split(ctx.saved_tensors)
        mu = _Solve.apply(method, point, not ctx.transposed, *solution, *inputs, *cotangents)  # type: ignore[no-untyped-call]
        left, right = (mu, adjoint) if ctx.transposed else (adjoint, mu)
        changes = evaluate_isolated(_bilinear_gradient, point, *solution, *inputs, *left, *right)
        return None, None, None, *(t.neg() if t.is_floating_point() else t for t in changes), *mu


def is_read(stage: StageFunction, status: Status) -> bool:
    """Return whether the report of a solve that ended so is read."""
    return stage.reports_solves or not status.ok


def gradient_norm(gradient: Sequence[Tensor | None]) -> float:
    """Return ‖g‖ over the parameters that take part."""
    return norm([g for g in gradient if g is not None])


def _warm_start_key(stage: StageFunction) -> str | None:
    """Return where the solution that a solve starts from is kept, and its own is to be; nowhere for later solves."""
    return stage.name if stage.first_solve() else None


def normalising_factor(size: float) -> float:
    """Return a power of two that brings c near length 1 if its square could leave the range of its dtype."""
    if size == 0 or not math.isfinite(size) or SAFE_LENGTHS[0] < size < SAFE_LENGTHS[1]:
        return 1.0
    return 2.0 ** -round(math.log2(size))


def _mixed_product(
    stationarity: Stationarity, _: Vector, inputs: Vector, adjoint: Vector, create_graph: bool
) -> Vector:
    """Return Gᵀ λ."""
    return filled(gradients(stationarity(), inputs, adjoint, create_graph=create_graph), inputs)


def _bilinear_gradient(
    stationarity: Stationarity, solution: Vector, inputs: Vector, pair: Vector, create_graph: bool
) -> Vector:
    """Return ∂(leftᵀ H right)/∂(θ, x) for constant `left` and `right`."""
    left, right = pair[: len(solution)], pair[len(solution) :]
    at = (*solution, *inputs)
    product = gradients(stationarity(), solution, left, create_graph=True)
    return filled(gradients(product, at, right, create_graph=create_graph), at)
