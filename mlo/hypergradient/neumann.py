"""The inverse Hessian as a truncated Neumann series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlo.hypergradient.conjugate_gradient import FLAT
from mlo.hypergradient.implicit import ImplicitMethod, Solution
from mlo.hypergradient.scaling import Scale, factors_as_tensors, is_scale, scale_factors
from mlo.linear_system import LinearSystem
from mlo.options import is_count, is_number
from mlo.recurrence import Ending, Recurrence, TracedProduct
from mlo.stage_function import StageFunction
from mlo.status import Status
from mlo.traced import inner, times
from mlo.vectors import Vector, add, add_, norm, rounding_unit, scale, zeros_like

# A residual that has grown by this factor does not come back, and would overflow in the end.
_HOPELESS = 1e6
# A series of a given length is looked at after every so many terms, and at its end: for a small stage a norm takes a
# tenth of a product's time.
_LOOKED_AT = 4
# Terms of a series that is to converge: to the default rtol it takes that many at a condition number of 350, where
# conjugate gradients take 200 steps at most.
_MOST_TERMS = 10_000
# How the largest eigenvalue is estimated for `scale="auto"`.
_POWER_STEPS = 16
_SAFETY = 1.25


@dataclass(frozen=True)
class Neumann(ImplicitMethod):
    """H⁻¹ ≈ S Σₖ (I − H S)ᵏ for k = 0 … terms − 1, with S = `scale`·I.

    Converges to H⁻¹ if and only if every eigenvalue of H lies in (0, 2 / scale); the error then shrinks by
    max |1 − scale·eigenvalue| per term. With the inner learning rate as the scale, k terms equal
    differentiating through k gradient steps at the solution.

    Args:
        terms: number of terms, at least 1; one term is `Identity(scale)`. `None`: until converged to rtol, at most
            10,000.
        scale: the factor, or `None` for the learning rate of each parameter group of the stage. `"auto"`: 1/(1.25 ρ)
            where ρ ≤ |λmax| is the growth ‖Hv‖/‖v‖ in the last of 16 power iterations, from a random v that a generator
            of the method's own draws. The series then converges for symmetric positive definite H: to diverge it would
            need a v with less than the 2.5⁻¹⁶-th (4e-7) of its length along the eigenvector of λmax, where a random one
            has about the 1/√n-th, n the number of parameters.
        rtol: stop before `terms` once ‖c − Hλ‖ ≤ rtol·‖c‖ (not below the rounding unit of the dtype). 0 takes all
            terms.
        on_breakdown: see `HypergradientMethod`. The series breaks down when its residual grows, and with `terms=None`
            also when it stays as it is.

    Raises:
        ConfigurationError: an option is out of range.

    Cost: terms − 1 Hessian–vector products (one reverse pass each, on one retained graph), 16 more for `"auto"`, and
    one mixed product; three vectors of the stage's size. The reported residual is the one before the last term where
    `terms` ends the series: knowing the last one would cost a further product.

    Source: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS 2020; on power iterations from a random vector, Dixon, "Estimating extremal
    eigenvalues and condition numbers of matrices", SIAM J. Numer. Anal. 1983.

    >>> import mlo, torch
    >>> def loss(w, x):                                   # w*(x) = x / 2 and H = 2
    ...     return w**2 - w * x
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> w = mlo.best_response(loss, torch.tensor(1.5), x, mlo.Neumann(terms=3, scale=0.25))
    >>> torch.autograd.grad(w, x)[0].item()               # (1 + 1/2 + 1/4) / 4
    0.4375
    >>> w = mlo.best_response(loss, torch.tensor(1.5), x, mlo.Neumann(terms=None, scale="auto"))
    >>> round(torch.autograd.grad(w, x)[0].item(), 6)     # 1 / 2
    0.5

    """

    terms: int | None = 20
    scale: Scale | Literal["auto"] = None
    rtol: float = 1e-10

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.terms is not None and not is_count(self.terms):
            raise self.option_error("terms", "an integer of at least 1, or None to go on until rtol is reached")
        if self.scale != "auto" and not is_scale(self.scale):
            raise self.option_error("scale", "a positive number, or None for the stage's learning rate, or 'auto'")
        if not is_number(self.rtol) or not 0 <= self.rtol < 1:
            raise self.option_error("rtol", "a number in [0, 1)")
        if self.terms is None and self.rtol == 0:
            raise self.option_error("rtol", "a positive number with terms=None, which ends by rtol alone")

    @property
    def needs_learning_rate(self) -> bool:
        """Whether the scale is the stage's learning rate."""
        return self.scale is None

    def solve(self, system: LinearSystem) -> Solution:
        """Return the partial sum λ = S Σ rₖ, by r ← r − H S r from r = c.

        With one number for S neither r nor the sum is multiplied by it before the end.
        """
        residual = system.rhs
        first = before = size = system.rhs_norm
        if size == 0:
            return Solution(zeros_like(residual), Status.CONVERGED, 0, 0.0)
        if not math.isfinite(size):
            return Solution(residual, Status.NON_FINITE, 0, size)
        factors = self._factors(system)
        if factors is None:
            return Solution(zeros_like(residual), Status.SINGULAR, 0, 1.0)
        limit = first * max(self.rtol, rounding_unit(residual)) if self.rtol else 0.0
        flat = FLAT * min(
            rounding_unit(residual), torch.finfo(torch.float32).eps
        )  # norms are formed in float32 at least
        terms = self.terms or _MOST_TERMS
        total = residual
        for term in range(1, terms + 1):
            if term > 1:
                total = add_(total, residual) if term > 2 else add(total, residual)
            if term < terms:
                # The right-hand side is not this method's own; what follows is.
                residual = _next(system, residual, factors, in_place=term > 1)
                if self.rtol == 0 and term % _LOOKED_AT != 0 and term < terms - 2:
                    continue
                before, size = size, norm(residual)
            status = _end(size, first, limit)
            if status is None and self.terms is None and abs(size - before) <= flat * before:
                status = Status.SINGULAR
            if status is not None:
                return Solution(scale(total, factors), status, term, size / first)
        # For symmetric H the logarithm of ‖(I − SH)ᵏ c‖ is convex in k: once it grows, it grows for ever.
        status = Status.DIVERGED if size > before else Status.TRUNCATED
        return Solution(scale(total, factors), status, terms, size / first)

    def recurrence(self) -> Recurrence | None:
        """Return the series, if its number of terms is given and its factors are known."""
        return None if type(self) is not Neumann or self.terms is None or self.scale == "auto" else _Series(self)

    def _factors(self, system: LinearSystem) -> float | tuple[float, ...] | None:
        """Return the diagonal of S, a number for each tensor or one for all; `None` where H is zero."""
        if not isinstance(self.scale, str):
            factors = scale_factors(self, self.scale, system)
            each = set(factors) if isinstance(factors, tuple) else {factors}
            return float(each.pop()) if len(each) == 1 else factors
        largest = _largest_eigenvalue(system)
        if not math.isfinite(largest):
            return math.nan
        return 1 / (_SAFETY * largest) if largest > 0 else None


class _Series(Recurrence):
    """What `Neumann.solve` does, with ‖r‖² for each residual r."""

    def __init__(self, method: Neumann) -> None:
        assert method.terms is not None
        assert not isinstance(method.scale, str)
        self.steps, self.count = method.terms, method.terms - 1
        self._method, self._scale = method, method.scale

    @staticmethod
    def run(
        product: TracedProduct, rhs: Sequence[Tensor], steps: int, factors: Vector
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        residual = total = list(rhs)
        rows = []
        for _ in range(steps - 1):
            curved = product(list(map(times, factors, residual)))
            residual = [r - c for r, c in zip(residual, curved, strict=True)]
            total = [t + r for t, r in zip(total, residual, strict=True)]
            rows.append([inner(residual, residual)])
        return list(map(times, factors, total)), rows

    def factors(self, stage: StageFunction, theta: Sequence[Tensor]) -> Vector:
        return factors_as_tensors(self._method, self._scale, stage, theta)

    def ending(self, numbers: Sequence[float], theta: Sequence[Tensor], size: float) -> Ending | None:
        rtol = self._method.rtol
        limit = size * max(rtol, rounding_unit(theta)) if rtol else 0.0
        sizes = [size, *[math.sqrt(n) if n >= 0 else math.nan for n in numbers]]
        if any(_end(s, size, limit) is not None for s in sizes) or sizes[-1] > sizes[max(len(sizes) - 2, 0)]:
            return None
        return Ending(Status.TRUNCATED, self.steps, sizes[-1] / size, self.steps - 1)


def _next(system: LinearSystem, residual: Vector, factors: float | tuple[float, ...], *, in_place: bool) -> Vector:
    """Return r − H S r, in the memory of r or in new."""
    add_to = add_ if in_place else add
    if isinstance(factors, float):
        return add_to(residual, system.product(residual), -factors)
    return add_to(residual, system.product(scale(residual, factors)), -1.0)


def _largest_eigenvalue(system: LinearSystem) -> float:
    """Return a lower bound of the largest |eigenvalue| by power iterations, the same whatever the right-hand side is.

    A start from the right-hand side would make λ depend on it in a way that is not linear, and the Hessian of a stage
    above not symmetric.
    """
    generators = {t.device: torch.Generator(t.device).manual_seed(0) for t in system.rhs}
    vector: Vector = tuple(
        torch.randn(t.shape, generator=generators[t.device], dtype=t.dtype, device=t.device) for t in system.rhs
    )
    size = norm(vector)
    for _ in range(_POWER_STEPS):
        if not 0 < size < math.inf:
            break
        vector = system.product(scale(vector, 1 / size))
        size = norm(vector)
    return size


def _end(size: float, first: float, limit: float) -> Status | None:
    """Return how the series ends at a residual of that size, or `None` if it goes on."""
    if math.isnan(size):
        return Status.NON_FINITE
    if size > _HOPELESS * first:
        return Status.DIVERGED
    if size <= limit:
        return Status.CONVERGED
    return None
