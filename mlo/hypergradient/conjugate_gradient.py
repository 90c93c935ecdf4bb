"""The linear system of a stage solved by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.implicit import ImplicitMethod, Solution
from mlo.hypergradient.nystrom import ApproximateInverse, Nystrom
from mlo.linear_system import LinearSystem
from mlo.options import is_count, is_number
from mlo.recurrence import Ending, Recurrence, TracedProduct
from mlo.stage_function import StageFunction
from mlo.status import Status
from mlo.traced import inner, numbers_as_tensors, times
from mlo.vectors import Vector, add, add_, dot, norm, rounding_unit, scale, scale_and_add_, subtract, zeros_like

# A direction counts as one of no curvature below this many rounding units of the largest curvature met: at a
# singular Hessian such directions were measured at 1 rounding unit and below, in float32 and float64.
FLAT = 10.0


@dataclass(frozen=True)
class Cycle:
    """What a cycle of a solver makes of a residual r.

    Attributes:
        correction: to be added to λ.
        steps: how many of the steps that were left it has used.
        error: the length of the residual with the correction, as the cycle knows it.
        status: how the solve ends, or `None` where the residual is to be formed anew, and another cycle may follow.
        at_minimum: whether r is a least one already: ‖Hr‖ is small beside ‖H‖‖r‖.

    """

    correction: Vector
    steps: int
    error: float
    status: Status | None
    at_minimum: bool = False


class KrylovMethod(ImplicitMethod):
    """What the solvers by Krylov spaces have in common: their options, where they start and when they stop.

    The options are fields of each of the subclasses, in an order of their own.
    """

    max_steps: int
    rtol: float
    atol: float
    damping: float
    warm_start: bool

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not is_count(self.max_steps):
            raise self.option_error("max_steps", "an integer of at least 1")
        if not is_number(self.rtol) or not 0 <= self.rtol < 1:
            raise self.option_error("rtol", "a number in [0, 1)")
        if not is_number(self.atol) or self.atol < 0:
            raise self.option_error("atol", "a number of at least 0")
        if not is_number(self.damping) or self.damping < 0:
            raise self.option_error("damping", "a number of at least 0")
        if not isinstance(self.warm_start, bool):
            raise self.option_error("warm_start", "True or False")

    @property
    def keeps_solutions(self) -> bool:
        """Whether solves start from the solution of the step before."""
        return self.warm_start

    def _in_cycles(self, system: LinearSystem, cycle: Callable[[Vector, float, float, int], Cycle]) -> Solution:
        """Return λ by cycles that each begin from the residual that the one before has left.

        `cycle` gets that residual, its length, the length to reach and the steps that are left.
        """
        size = system.rhs_norm
        if size == 0:
            return Solution(zeros_like(system.rhs), Status.CONVERGED, 0, 0.0)
        if not math.isfinite(size):
            return Solution(system.rhs, Status.NON_FINITE, 0, size)
        tolerance = self._tolerance(system.rhs, size)
        start, residual, error = self._start(system, size)
        adjoint, steps = _or_zero(start, system), 0
        while error > tolerance:
            done = cycle(residual, error, tolerance, self.max_steps - steps)
            steps += done.steps
            if done.status is not None:
                return Solution(add(adjoint, done.correction), done.status, steps, done.error / size)
            corrected = add(adjoint, done.correction)
            residual = self._residual(system, corrected)
            before, error = error, norm(residual)
            if not error < before * (1 - FLAT * rounding_unit(residual)):  # the next cycle would do no more
                status = Status.SINGULAR if done.at_minimum else Status.TRUNCATED
                return Solution(adjoint, status, steps, before / size)
            adjoint = corrected
        return Solution(adjoint, Status.CONVERGED, steps, error / size)

    def _tolerance(self, rhs: Sequence[Tensor], size: float) -> float:
        """Return the length of the residual at which to stop, for a right-hand side of length `size`."""
        return max(size * (max(self.rtol, rounding_unit(rhs)) if self.rtol else 0.0), self.atol)

    def _start(self, system: LinearSystem, size: float) -> tuple[Vector | None, Vector, float]:
        """Return the first λ, `None` for zero or the kept solution where that is better, its residual and its length.

        They are not the method's own to write to.
        """
        kept = system.last_solution if self.warm_start else None
        if kept is not None:
            residual = self._residual(system, kept)
            length = norm(residual)
            if length < size:
                return kept, residual, length
        return None, system.rhs, size

    def _residual(self, system: LinearSystem, adjoint: Vector) -> Vector:
        """Return c − (H + damping·I)λ, at the cost of a product."""
        return subtract(system.rhs, self._damped_product(system, adjoint))

    def _damped_product(self, system: LinearSystem, vector: Vector) -> Vector:
        product = system.product(vector)
        return add(product, vector, self.damping) if self.damping else product


@dataclass(frozen=True)
class ConjugateGradient(KrylovMethod):
    """Solve (H + damping·I) λ = c by conjugate gradients; H must be symmetric positive definite.

    The error in the H-norm shrinks at least by (√κ − 1)/(√κ + 1) per step, κ the condition number; in
    exact arithmetic the solve ends after as many steps as H has distinct eigenvalues. With a preconditioner
    P ≈ H⁻¹ both are those of P (H + damping·I).

    Args:
        max_steps: upper limit of steps, at least 1.
        rtol: stop once ‖c − (H + damping·I)λ‖ ≤ rtol·‖c‖ (not below the rounding unit of the dtype, unless
            rtol = 0, which takes all steps).
        damping: added to the diagonal, at least 0. It biases the hypergradient and makes a semi-definite or
            mildly indefinite Hessian solvable.
        warm_start: begin from the solution of the outer step before, if there is one. With
            `best_response` it needs `warm_starts=`, the place that outlives the call.
        atol: stop as well once ‖c − (H + damping·I)λ‖ ≤ atol, in the units of c.
        preconditioner: a `Nystrom`, whose approximate inverse is made once per solve, of the same H. It changes how
            fast the solve converges, not what to: its damping biases nothing. Pays off where few eigenvalues are
            much larger than the others, with its damping near the others.
        on_breakdown: see `HypergradientMethod`. On a direction of negative curvature the steps made up to there
            are what `"warn"` uses; where H is singular to rounding, the step of the smallest residual.

    Raises:
        ConfigurationError: an option is out of range.

    Cost: one Hessian–vector product per step (one reverse pass each, on one retained graph), one more for a
    warm start, `rank` more for a preconditioner, and one mixed product; four vectors of the stage's size, and with
    a preconditioner its rank + 1 more.

    Source: Hestenes and Stiefel 1952; Nocedal and Wright, "Numerical Optimization", algorithms 5.2 and 5.3; as a
    hypergradient, Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016; the
    preconditioner, Frangella, Tropp and Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 2023.

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
    atol: float = 0.0
    preconditioner: Nystrom | None = None

    assumes_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.preconditioner is not None and not isinstance(self.preconditioner, Nystrom):
            raise self.option_error("preconditioner", "a Nystrom such as Nystrom(rank=10, damping=0.1), or None")

    def solve(self, system: LinearSystem) -> Solution:
        """Return λ by the standard recurrences."""
        size = system.rhs_norm
        if size == 0:
            return Solution(zeros_like(system.rhs), Status.CONVERGED, 0, 0.0)
        if not math.isfinite(size):
            return Solution(system.rhs, Status.NON_FINITE, 0, size)
        tolerance = self._tolerance(system.rhs, size)
        adjoint, residual, length = self._start(system, size)
        error = length**2
        inverse = self._inverse(system, needed=length > tolerance)
        direction: Vector = ()
        best, smallest = adjoint, error
        squared = previous = 0.0
        flat = FLAT * rounding_unit(residual)
        # Preconditioned directions may all be of small curvature: what the preconditioner saw of H counts as met.
        steepest = 0.0 if inverse is None else inverse.largest
        status, step = Status.TRUNCATED, 0
        while math.sqrt(error) > tolerance:
            if step == self.max_steps:
                break
            improved, slope = _preconditioned(inverse, residual, error)
            growth = slope / previous if step else 0.0
            direction = _next_direction(direction, growth, improved, step)
            # r is orthogonal to the direction before, z is not.
            squared = error + growth**2 * squared if inverse is None else dot(direction, direction)
            curved = self._damped_product(system, direction)
            curvature = dot(direction, curved)
            end = _out_of_range(curvature, squared, slope)
            if end is not None:
                status = end
                break
            bent = curvature / squared
            steepest = max(steepest, bent)
            if abs(bent) <= flat * steepest:
                return Solution(_or_zero(best, system), Status.SINGULAR, step, math.sqrt(smallest) / size)
            if curvature <= 0:
                status = Status.NEGATIVE_CURVATURE
                break
            length = slope / curvature
            # What the first step makes is this method's own, and written to from then on: it is as large as the stage,
            # and memory that is allocated anew takes longer to fill.
            plus = add_ if step else add
            adjoint = scale(direction, length) if adjoint is None else plus(adjoint, direction, length)
            residual = plus(residual, curved, -length)
            error = dot(residual, residual)
            if error < smallest:
                best, smallest = adjoint, error
            elif best is adjoint:
                best = add(adjoint, direction, -length)  # as it was before this step
            previous = slope
            step += 1
        else:
            status = Status.CONVERGED
        return Solution(_or_zero(adjoint, system), status, step, math.sqrt(error) / size)

    def recurrence(self) -> Recurrence | None:
        """Return the steps, if they begin from zero and have no preconditioner."""
        plain = type(self) is ConjugateGradient and not self.warm_start and self.preconditioner is None
        return _Steps(self) if plain else None

    def _inverse(self, system: LinearSystem, *, needed: bool) -> ApproximateInverse | None:
        return self.preconditioner.inverse(system) if needed and self.preconditioner is not None else None


class _Steps(Recurrence):
    """What `ConjugateGradient.solve` does, with pᵀHp, p·p and r·r for each direction p and the residual r after it."""

    def __init__(self, method: ConjugateGradient) -> None:
        self.steps, self.count, self._method = method.max_steps, 3 * method.max_steps, method

    @staticmethod
    def run(
        product: TracedProduct, rhs: Sequence[Tensor], steps: int, factors: Vector
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        adjoint = [torch.zeros_like(r) for r in rhs]
        residual = direction = list(rhs)
        error = squared = inner(residual, residual)
        rows = []
        for _ in range(steps):
            curved = product(direction)
            if factors:
                curved = [c + times(f, d) for c, f, d in zip(curved, factors, direction, strict=True)]
            curvature = inner(direction, curved)
            length = error / curvature
            adjoint = [a + length.to(a.dtype) * d for a, d in zip(adjoint, direction, strict=True)]
            residual = [r - length.to(r.dtype) * c for r, c in zip(residual, curved, strict=True)]
            after = inner(residual, residual)
            rows.append([curvature, squared, after])
            growth = after / error
            direction = [r + growth.to(r.dtype) * d for r, d in zip(residual, direction, strict=True)]
            error, squared = after, after + growth**2 * squared
        return adjoint, rows

    def factors(self, stage: StageFunction, theta: Sequence[Tensor]) -> Vector:
        damping = self._method.damping
        return numbers_as_tensors([damping] * len(theta), theta) if damping else ()

    def ending(self, numbers: Sequence[float], theta: Sequence[Tensor], size: float) -> Ending | None:
        tolerance, flat = self._method._tolerance(theta, size), FLAT * rounding_unit(theta)
        error, steepest = size**2, 0.0
        for curvature, squared, after in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            if not math.sqrt(error) > tolerance or _out_of_range(curvature, squared, error) is not None:
                return None
            bent = curvature / squared
            steepest = max(steepest, bent)
            if not bent > flat * steepest or not math.isfinite(after):
                return None
            error = after
        status = Status.TRUNCATED if math.sqrt(error) > tolerance else Status.CONVERGED
        return Ending(status, self.steps, math.sqrt(error) / size, self.steps)


def _next_direction(direction: Vector, growth: float, improved: Vector, step: int) -> Vector:
    """Return z + growth·direction; the first is z itself, the second new, and from then on there is one memory."""
    if step == 0:
        return improved
    return add(improved, direction, growth) if step == 1 else scale_and_add_(direction, growth, improved)


def _or_zero(adjoint: Vector | None, system: LinearSystem) -> Vector:
    return zeros_like(system.rhs) if adjoint is None else adjoint


def _out_of_range(curvature: float, squared: float, slope: float) -> Status | None:
    """Return how a solve ends whose numbers have left the range of the dtype, or `None` if they have not."""
    if not math.isfinite(curvature):
        return Status.NON_FINITE
    # With rtol = 0 the squares become zero in the end.
    return Status.CONVERGED if squared == 0 or slope == 0 else None


def _preconditioned(inverse: ApproximateInverse | None, residual: Vector, error: float) -> tuple[Vector, float]:
    """Return z = Pr and r·z; without a preconditioner r itself, and r·r, which is known."""
    if inverse is None:
        return residual, error
    improved = inverse(residual)
    return improved, dot(residual, improved)
