"""The linear system of a stage solved by minimal residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mlo.hypergradient.conjugate_gradient import FLAT, Cycle, KrylovMethod
from mlo.hypergradient.implicit import Solution
from mlo.linear_system import LinearSystem
from mlo.status import Status
from mlo.vectors import Vector, add, dot, norm, rounding_unit, scale, zeros_like


@dataclass(frozen=True)
class MINRES(KrylovMethod):
    """Solve (H + damping·I) λ = c by minimal residuals; H must be symmetric, and may be indefinite or singular.

    Step k takes the λ of the smallest residual out of the Krylov space spanned by c, Hc, …, Hᵏ⁻¹c, as `GMRES` does, by
    recurrences of three terms. The residual never grows, and shrinks at least by (κ − 1)/(κ + 1) per two steps, κ the
    ratio of the largest to the smallest |eigenvalue| other than 0; for definite H as with `ConjugateGradient`. In exact
    arithmetic the solve ends after as many steps as H has distinct eigenvalues; rounding delays the end, but does not
    prevent it.

    A singular system that has a solution is solved. One that has none is approached as a least-squares problem: the
    solve notices that ‖Hr‖ has become small beside ‖H‖‖r‖ for its residual r, and ends with `Status.SINGULAR`.

    Args:
        max_steps: upper limit of steps, at least 1.
        rtol: stop once ‖c − (H + damping·I)λ‖ ≤ rtol·‖c‖ (not below the rounding unit of the dtype, unless
            rtol = 0, which takes all steps).
        atol: stop as well once ‖c − (H + damping·I)λ‖ ≤ atol, in the units of c.
        damping: added to the diagonal, at least 0. It biases the hypergradient, and moves the eigenvalues of an
            indefinite Hessian towards zero as well as away from it.
        warm_start: begin from the solution of the outer step before, if there is one. With
            `best_response` it needs `warm_starts=`, the place that outlives the call.
        on_breakdown: see `HypergradientMethod`. At a singular system without a solution, `"warn"` uses the λ of the
            smallest ‖Hr‖, before rounding lets it grow along the directions that H does not see.

    Raises:
        ConfigurationError: an option is out of range.

    Cost: one Hessian–vector product per step, one more for a warm start, and one mixed product. One more where κ² times
    the rounding unit exceeds rtol: the recurrences may have lost the residual by then, which is formed anew, and solved
    for again if it is too large. Ten vectors of the size of the stage, whatever the number of steps.

    Source: Paige and Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J. Numer. Anal. 1975;
    on the least-squares criterion, Choi, Paige and Saunders, "MINRES-QLP", SIAM J. Sci. Comput. 2011; on the loss by
    κ², Sleijpen, van der Vorst and Modersitzki, SIAM J. Matrix Anal. Appl. 2000.

    >>> import mlo, torch
    >>> def loss(w, x):                                   # indefinite: w*(x) = x / (1, −2)
    ...     return (torch.tensor([0.5, -1.0]) * w**2).sum() - (w * x).sum()
    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> w = mlo.best_response(loss, torch.tensor([3.0, -2.0]), x, mlo.MINRES())
    >>> torch.autograd.grad(w.sum(), x)[0].numpy().round(6).tolist()
    [1.0, -0.5]

    """

    max_steps: int = 100
    rtol: float = 1e-10
    atol: float = 0.0
    damping: float = 0.0
    warm_start: bool = False

    assumes_symmetric: ClassVar[bool] = True

    def solve(self, system: LinearSystem) -> Solution:
        """Return λ; where rounding may have spoilt the recurrences, from the residual formed anew once more."""

        def cycle(residual: Vector, error: float, tolerance: float, most: int) -> Cycle:
            process = _Lanczos(residual, error)
            status = self._extend(system, process, tolerance, most)
            if status is None or status is Status.CONVERGED:
                return Cycle(process.total, process.steps, process.error, status)
            return Cycle(*process.usable(), status)

        return self._in_cycles(system, cycle)

    def _extend(self, system: LinearSystem, process: _Lanczos, tolerance: float, most: int) -> Status | None:
        """Make steps; return how the solve ends, or `None` if the residual has to be formed to know."""
        while process.steps < most:
            image = self._damped_product(system, process.vector)
            if not process.add(image):
                return Status.NON_FINITE
            if process.singular:
                return Status.SINGULAR
            if process.error <= tolerance:
                return Status.CONVERGED if process.loss_of_accuracy <= tolerance else None
        return Status.TRUNCATED


class _Lanczos:
    """An orthonormal basis V of the Krylov space of r by three-term recurrences, and min ‖r − H V y‖ on it.

    H V = V⁺ T, where V⁺ has one vector more and T is tridiagonal, makes it min ‖‖r‖ e₁ − T y‖. Givens rotations keep
    T = QR, column by column. With W = V R⁻¹, whose columns follow from the two before, V y grows by a multiple of the
    last one at each step.
    """

    def __init__(self, residual: Vector, error: float) -> None:
        self.vector = scale(residual, 1 / error)
        self.total = zeros_like(residual)  # V y
        self.error = error
        self.steps = 0
        self.singular = False
        self._first_error = error
        self._unit = rounding_unit(residual)
        self._vector_before = self._direction = self._direction_before = self.total
        self._beta = 0.0  # the entry of T beside the diagonal
        self._rotation = self._rotation_before = (1.0, 0.0)
        self._target = error  # the last entry of Qᵀ ‖r‖ e₁
        self._largest = 0.0  # of the columns of T: a lower bound of ‖H‖
        self._flattest = math.inf  # of ‖Hw‖ / ‖w‖ over the columns of W: an upper bound of the smallest |eigenvalue|
        self._best, self._smallest, self._error_of_best = self.total, math.inf, error

    @property
    def loss_of_accuracy(self) -> float:
        """By how much the residual may differ from what the recurrences make it: they lose κ² rounding units."""
        return self._first_error * self._unit * (self._largest / self._flattest) ** 2

    def add(self, image: Vector) -> bool:
        """Take H times the last vector of the basis into the problem; return whether all is finite."""
        alpha = dot(self.vector, image)
        rest = add(add(image, self._vector_before, -self._beta), self.vector, -alpha)
        below = norm(rest)
        if not math.isfinite(alpha + below):
            return False
        self._largest = max(self._largest, math.hypot(self._beta, alpha, below))
        (c_before, s_before), (c, s) = self._rotation_before, self._rotation
        above, middle = s_before * self._beta, c_before * self._beta
        beside, diagonal = c * middle + s * alpha, c * alpha - s * middle
        self._note_minimum(math.hypot(diagonal, c * below))
        pivot = math.hypot(diagonal, below)
        if pivot <= self._flat:
            self.singular = True
            return True
        self._rotation_before, self._rotation = self._rotation, (diagonal / pivot, below / pivot)
        direction = add(add(self.vector, self._direction_before, -above), self._direction, -beside)
        direction = scale(direction, 1 / pivot)
        self._flattest = min(self._flattest, 1 / norm(direction))
        if self._flattest <= self._flat and self._at_minimum:
            self.singular = True
            return True
        self._direction_before, self._direction = self._direction, direction
        c, s = self._rotation
        self.total = add(self.total, direction, c * self._target)
        self._target = -s * self._target
        self.error = abs(self._target)
        self.steps += 1
        if below > 0:  # else the error is zero
            self._vector_before, self.vector, self._beta = self.vector, scale(rest, 1 / below), below
        return True

    def usable(self) -> tuple[Vector, int, float]:
        """Return what the process is worth: where it may have gone beyond the least residual, what it had there."""
        if self._at_minimum:
            return self._best, self.steps, self._error_of_best
        return self.total, self.steps, self.error

    def _note_minimum(self, slope: float) -> None:
        """Keep the present V y if its ‖Hr‖ / ‖r‖ = `slope` is the least since the residual was twice as long."""
        if slope < self._smallest or self._has_halved:
            self._best, self._smallest, self._error_of_best = self.total, slope, self.error

    @property
    def _at_minimum(self) -> bool:
        """Whether the residual has come to where H hardly sees it, and has not got away from there."""
        return self._smallest <= math.sqrt(self._unit) * self._largest and not self._has_halved

    @property
    def _has_halved(self) -> bool:
        return self.error < self._error_of_best / 2

    @property
    def _flat(self) -> float:
        return FLAT * self._unit * self._largest
