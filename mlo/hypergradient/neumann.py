"""The inverse Hessian as a truncated Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlo.hypergradient.implicit import ImplicitMethod, Solution
from mlo.hypergradient.options import is_count, is_number
from mlo.hypergradient.scaling import Scale, is_scale, scale_factors
from mlo.linear_system import LinearSystem
from mlo.status import Status
from mlo.vectors import add, norm, scale, subtract, zeros_like

# A residual that has grown by this factor does not come back, and would overflow in the end.
_HOPELESS = 1e6


@dataclass(frozen=True)
class Neumann(ImplicitMethod):
    """H⁻¹ ≈ S Σₖ (I − H S)ᵏ for k = 0 … terms − 1, with S = `scale`·I.

    Converges to H⁻¹ if and only if every eigenvalue of H lies in (0, 2 / scale); the error then shrinks by
    max |1 − scale·eigenvalue| per term. With the inner learning rate as the scale, k terms equal
    differentiating through k gradient steps at the solution.

    Args:
        terms: number of terms, at least 1; one term is `Identity(scale)`.
        scale: the factor, or `None` for the learning rate of each parameter group of the stage.
        rtol: stop before `terms` once ‖c − Hλ‖ ≤ rtol·‖c‖. 0 takes all terms.
        on_breakdown: see `HypergradientMethod`. The series breaks down when its residual grows.

    Raises:
        ConfigurationError: an option is out of range.

    Cost: terms − 1 Hessian–vector products (one reverse pass each, on one retained graph) and one mixed
    product. The reported residual is the one before the last term where `terms` ends the series: knowing
    the last one would cost a further product.

    Source: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS 2020.

    >>> import mlo, torch
    >>> def loss(w, x):                                   # w*(x) = x / 2 and H = 2
    ...     return w**2 - w * x
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> w = mlo.best_response(loss, torch.tensor(1.5), x, mlo.Neumann(terms=3, scale=0.25))
    >>> torch.autograd.grad(w, x)[0].item()               # (1 + 1/2 + 1/4) / 4
    0.4375

    """

    terms: int = 20
    scale: Scale = None
    rtol: float = 1e-10

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not is_count(self.terms):
            raise self.option_error("terms", "an integer of at least 1")
        if not is_scale(self.scale):
            raise self.option_error("scale", "a positive number, or None for the stage's learning rate")
        if not is_number(self.rtol) or not 0 <= self.rtol < 1:
            raise self.option_error("rtol", "a number in [0, 1)")

    @property
    def needs_learning_rate(self) -> bool:
        """Whether the scale is the stage's learning rate."""
        return self.scale is None

    def solve(self, system: LinearSystem) -> Solution:
        """Return the partial sum, by λ ← λ + S r, r ← r − H S r from λ = 0, r = c."""
        factors = scale_factors(self, self.scale, system)
        residual = system.rhs
        size = norm(residual)
        first, before = size, size
        adjoint = zeros_like(residual)
        if size == 0:
            return Solution(adjoint, Status.CONVERGED, 0, 0.0)
        for term in range(1, self.terms + 1):
            step = scale(residual, factors)
            adjoint = add(adjoint, step)
            if term < self.terms:
                residual = subtract(residual, system.product(step))
                before, size = size, norm(residual)
            if math.isnan(size) or math.isinf(first):
                return Solution(adjoint, Status.NON_FINITE, term, size / first)
            if size > _HOPELESS * first:
                return Solution(adjoint, Status.DIVERGED, term, size / first)
            if size <= self.rtol * first:
                return Solution(adjoint, Status.CONVERGED, term, size / first)
        # For symmetric H the logarithm of ‖(I − SH)ᵏ c‖ is convex in k: once it grows, it grows for ever.
        status = Status.DIVERGED if size > before else Status.TRUNCATED
        return Solution(adjoint, status, self.terms, size / first)
