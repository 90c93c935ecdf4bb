"""The linear system of a stage solved by generalised minimal residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlo.hypergradient.conjugate_gradient import FLAT, Cycle, KrylovMethod
from mlo.hypergradient.implicit import Solution
from mlo.linear_system import LinearSystem
from mlo.options import is_count
from mlo.status import Status
from mlo.vectors import Vector, add, dot, norm, rounding_unit, scale, zeros_like

# Orthogonalisation is repeated where it has left less than this share of a vector: what is left is rounded by then.
_CANCELLED = 0.7


@dataclass(frozen=True)
class GMRES(KrylovMethod):
    """Solve (H + damping·I) λ = c by generalised minimal residuals; H may be indefinite or non-symmetric.

    Step k takes the λ of the smallest residual out of the Krylov space spanned by c, Hc, …, Hᵏ⁻¹c, so the residual
    never grows. In exact arithmetic the solve ends after as many steps as the minimal polynomial of H has degree, at
    most n, if H is not singular. How fast before depends on the eigenvalues and, for H that is not normal, on more: the
    residual may stay as it is for n − 1 steps. With restarts, convergence is sure only where the symmetric part of H is
    definite.

    Args:
        max_steps: upper limit of steps over all restarts, at least 1.
        rtol: stop once ‖c − (H + damping·I)λ‖ ≤ rtol·‖c‖ (not below the rounding unit of the dtype, unless
            rtol = 0, which takes all steps).
        atol: stop as well once ‖c − (H + damping·I)λ‖ ≤ atol, in the units of c.
        restart: begin anew from the present λ after that many steps, which bounds the memory; `None` never does.
        damping: added to the diagonal, at least 0. It biases the hypergradient, and moves the eigenvalues of an
            indefinite Hessian towards zero as well as away from it.
        warm_start: begin from the solution of the outer step before, if there is one. With
            `best_response` it needs `warm_starts=`, the place that outlives the call.
        on_breakdown: see `HypergradientMethod`. Where H is singular to rounding on the Krylov space, `"warn"` uses the
            shortest λ of the smallest residual in it, singular values below √(rounding unit)·‖H‖ taken for zero. A
            system with a singular H that has a solution is solved all the same where the Krylov space contains one,
            as it does for symmetric H.

    Raises:
        ConfigurationError: an option is out of range.

    Cost: one Hessian–vector product per step, one more for each restart and for a warm start, and one mixed product.
    Memory grows by one vector of the stage's size at each step up to `restart`, and the work at step k is 2k vector
    operations: where H is symmetric, `MINRES` and `ConjugateGradient` do the same in constant memory.

    The reported residual is that of the least-squares problem, which the one of λ may exceed by about the rounding unit
    times ‖H‖‖λ‖: no solver does better at that precision.

    Source: Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
    systems", SIAM J. Sci. Stat. Comput. 1986; on singular systems, Brown and Walker, "GMRES on (nearly) singular
    systems", SIAM J. Matrix Anal. Appl. 1997.

    >>> import mlo, torch
    >>> def loss(w, x):                                   # indefinite: w*(x) = x / (1, −2)
    ...     return (torch.tensor([0.5, -1.0]) * w**2).sum() - (w * x).sum()
    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> w = mlo.best_response(loss, torch.tensor([3.0, -2.0]), x, mlo.GMRES())
    >>> torch.autograd.grad(w.sum(), x)[0].numpy().round(6).tolist()
    [1.0, -0.5]

    """

    max_steps: int = 100
    rtol: float = 1e-10
    atol: float = 0.0
    restart: int | None = None
    damping: float = 0.0
    warm_start: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.restart is not None and not is_count(self.restart):
            raise self.option_error("restart", "an integer of at least 1, or None")

    def solve(self, system: LinearSystem) -> Solution:
        """Return λ, from a new Krylov space after each restart."""

        def cycle(residual: Vector, error: float, tolerance: float, most: int) -> Cycle:
            space = _KrylovSpace(residual, error)
            status = self._extend(system, space, tolerance, most)
            correction, error = space.correction(regular=status is not Status.SINGULAR)
            return Cycle(correction, space.steps, error, status, space.at_minimum)

        return self._in_cycles(system, cycle)

    def _extend(self, system: LinearSystem, space: _KrylovSpace, tolerance: float, most: int) -> Status | None:
        """Make steps; return how the solve ends, or `None` if another cycle may go on."""
        while space.steps < min(self.restart or most, most):
            image = self._damped_product(system, space.basis[-1])
            if not math.isfinite(norm(image)):
                return Status.NON_FINITE
            if not space.add(image):
                return Status.SINGULAR
            if space.error <= tolerance:
                return Status.CONVERGED
            if space.exhausted:
                return None
        return None if space.steps < most else Status.TRUNCATED


class _KrylovSpace:
    """An orthonormal basis V of the Krylov space of r, and the least-squares problem min ‖r − H V y‖ on it.

    Arnoldi's H V = V⁺ T, where V⁺ has one vector more and T is of Hessenberg form, makes it min ‖‖r‖ e₁ − T y‖.
    Givens rotations keep T = QR, column by column, and R y = Qᵀ ‖r‖ e₁ is solved in the end.
    """

    def __init__(self, residual: Vector, error: float) -> None:
        self.basis = [scale(residual, 1 / error)]
        self.error = error
        self.exhausted = False  # H maps the space to itself: no larger one will come
        self._unit = rounding_unit(residual)
        self._lengths: list[float] = []
        self._rotations: list[tuple[float, float]] = []
        self._triangle = torch.zeros(0, 0, dtype=torch.float64)  # R
        self._targets = [error]  # Qᵀ ‖r‖ e₁

    @property
    def steps(self) -> int:
        return len(self._rotations)

    @property
    def at_minimum(self) -> bool:
        """Whether ‖Hr‖ is small beside ‖H‖‖r‖: its square, what the length of r can still shrink by, is rounding."""
        return bool(self._lengths) and self._lengths[0] <= math.sqrt(FLAT * self._unit) * max(self._lengths)

    def add(self, image: Vector) -> bool:
        """Take H times the last vector of the basis into the problem; return whether H is regular on the new space."""
        self._lengths.append(norm(image))
        rest, column = self._orthogonalised(image)
        below = norm(rest)
        for i, (c, s) in enumerate(self._rotations):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        pivot = math.hypot(column[-1], below)
        flat = FLAT * self._unit * max(self._lengths)
        if pivot <= flat:
            return False
        c, s = column[-1] / pivot, below / pivot
        column[-1] = pivot
        triangle = F.pad(self._triangle, (0, 1, 0, 1))
        triangle[:, -1] = torch.tensor(column, dtype=torch.float64)
        # H maps V R⁻¹ eₖ to a vector of length 1.
        if _length_of_last_column_of_inverse(triangle) * flat >= 1:
            return False
        self._triangle = triangle
        self._rotations.append((c, s))
        self._targets[-1:] = [c * self._targets[-1], -s * self._targets[-1]]
        self.error = abs(self._targets[-1])
        self.exhausted = below <= FLAT * self._unit * self._lengths[-1]
        if not self.exhausted:
            self.basis.append(scale(rest, 1 / below))
        return True

    def correction(self, *, regular: bool) -> tuple[Vector, float]:
        """Return V y and the length of the residual that it leaves; the smallest such y where R is not regular."""
        targets = torch.tensor(self._targets, dtype=torch.float64)
        if regular:
            y = torch.linalg.solve_triangular(self._triangle, targets[:-1, None], upper=True)[:, 0]
        else:
            # What rounding makes of singular values that are zero was measured up to the square root of its unit.
            cut = math.sqrt(self._unit) * max(self._lengths)
            y = torch.linalg.pinv(self._triangle, atol=cut, rtol=0.0) @ targets[:-1]
        total = zeros_like(self.basis[0])
        for vector, coefficient in zip(self.basis, y.tolist(), strict=False):
            total = add(total, vector, coefficient)
        left = torch.linalg.vector_norm(targets[:-1] - self._triangle @ y).item()
        return total, self.error if regular else math.hypot(left, self.error)

    def _orthogonalised(self, image: Vector) -> tuple[Vector, list[float]]:
        """Return what is left of `image` beside the basis, and its coefficients in the basis."""
        column = [0.0] * len(self.basis)
        length = self._lengths[-1]
        for _ in range(2):
            for i, vector in enumerate(self.basis):
                share = dot(vector, image)
                image = add(image, vector, -share)
                column[i] += share
            left = norm(image)
            if left > _CANCELLED * length:
                break
            length = left
        return image, column


def _length_of_last_column_of_inverse(triangle: Tensor) -> float:
    unit = torch.zeros(len(triangle), 1, dtype=triangle.dtype)
    unit[-1] = 1
    column = torch.linalg.solve_triangular(triangle, unit, upper=True)
    return float(torch.linalg.vector_norm(column))
