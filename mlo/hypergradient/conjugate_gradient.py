"""The linear system of a stage solved by conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mlo.hypergradient.implicit import ImplicitMethod, Solution
from mlo.hypergradient.options import is_count, is_number
from mlo.linear_system import LinearSystem
from mlo.status import Status
from mlo.vectors import Vector, add, dot, norm, rounding_unit, subtract, zeros_like

# A direction counts as one of no curvature below this many rounding units of the largest curvature met: at a
# singular Hessian such directions were measured at 1 rounding unit and below, in float32 and float64.
_FLAT = 10.0


@dataclass(frozen=True)
class ConjugateGradient(ImplicitMethod):
    """Solve (H + damping·I) λ = c by conjugate gradients; H must be symmetric positive definite.

    The error in the H-norm shrinks at least by (√κ − 1)/(√κ + 1) per step, κ the condition number; in
    exact arithmetic the solve ends after as many steps as H has distinct eigenvalues.

    Args:
        max_steps: upper limit of steps, at least 1.
        rtol: stop once ‖c − (H + damping·I)λ‖ ≤ rtol·‖c‖ (not below the rounding unit of the dtype, unless
            rtol = 0, which takes all steps).
        damping: added to the diagonal, at least 0. It biases the hypergradient and makes a semi-definite or
            mildly indefinite Hessian solvable.
        warm_start: begin from the solution of the outer step before, if there is one. With
            `best_response` it needs `warm_starts=`, the place that outlives the call.
        on_breakdown: see `HypergradientMethod`. On a direction of negative curvature the steps made up to there
            are what `"warn"` uses; where H is singular to rounding, the step of the smallest residual.

    Raises:
        ConfigurationError: an option is out of range.

    Cost: one Hessian–vector product per step (one reverse pass each, on one retained graph), one more for a
    warm start, and one mixed product; four vectors of the stage's size.

    Source: Hestenes and Stiefel 1952; Nocedal and Wright, "Numerical Optimization", algorithm 5.2; as a
    hypergradient, Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016.

    >>> import mlo, torch
    >>> def loss(w, x):                                   # w*(x) = x / (1, 2)
    ...     return (torch.tensor([0.5, 1.0]) * w**2).sum() - (w * x).sum()
    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> w = mlo.best_response(loss, torch.tensor([3.0, 2.0]), x, mlo.ConjugateGradient())
    >>> torch.autograd.grad(w.sum(), x)[0].numpy().round(6).tolist()
    [1.0, 0.5]

    """

    max_steps: int = 100
    rtol: float = 1e-10
    damping: float = 0.0
    warm_start: bool = False

    assumes_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not is_count(self.max_steps):
            raise self.option_error("max_steps", "an integer of at least 1")
        if not is_number(self.rtol) or not 0 <= self.rtol < 1:
            raise self.option_error("rtol", "a number in [0, 1)")
        if not is_number(self.damping) or self.damping < 0:
            raise self.option_error("damping", "a number of at least 0")
        if not isinstance(self.warm_start, bool):
            raise self.option_error("warm_start", "True or False")

    @property
    def keeps_solutions(self) -> bool:
        """Whether solves start from the solution of the step before."""
        return self.warm_start

    def solve(self, system: LinearSystem) -> Solution:
        """Return λ by the standard recurrences."""
        size = norm(system.rhs)
        if size == 0:
            return Solution(zeros_like(system.rhs), Status.CONVERGED, 0, 0.0)
        if not math.isfinite(size):
            return Solution(system.rhs, Status.NON_FINITE, 0, size)
        tolerance = size * (max(self.rtol, rounding_unit(system.rhs)) if self.rtol else 0.0)
        adjoint, residual = self._start(system, size)
        direction = residual
        error = dot(residual, residual)
        best, smallest = adjoint, error
        flat = _FLAT * rounding_unit(system.rhs)
        steepest = 0.0
        status, step = Status.TRUNCATED, 0
        while math.sqrt(error) > tolerance:
            if step == self.max_steps:
                break
            curved = self._damped_product(system, direction)
            curvature = dot(direction, curved)
            if not math.isfinite(curvature):
                status = Status.NON_FINITE
                break
            bent = curvature / dot(direction, direction)
            steepest = max(steepest, bent)
            if abs(bent) <= flat * steepest:
                return Solution(best, Status.SINGULAR, step, math.sqrt(smallest) / size)
            if curvature <= 0:
                status = Status.NEGATIVE_CURVATURE
                break
            length = error / curvature
            adjoint = add(adjoint, direction, length)
            residual = add(residual, curved, -length)
            previous, error = error, dot(residual, residual)
            direction = add(residual, direction, error / previous)
            if error < smallest:
                best, smallest = adjoint, error
            step += 1
        else:
            status = Status.CONVERGED
        return Solution(adjoint, status, step, math.sqrt(error) / size)

    def _start(self, system: LinearSystem, size: float) -> tuple[Vector, Vector]:
        """Return the first λ and its residual: the kept solution where it is better than zero."""
        kept = system.last_solution if self.warm_start else None
        if kept is not None:
            residual = subtract(system.rhs, self._damped_product(system, kept))
            if norm(residual) < size:
                return kept, residual
        return zeros_like(system.rhs), system.rhs

    def _damped_product(self, system: LinearSystem, vector: Vector) -> Vector:
        product = system.product(vector)
        return add(product, vector, self.damping) if self.damping else product
