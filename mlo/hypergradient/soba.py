"""A linear system that is never solved, but followed: one step per outer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlo.hypergradient.implicit import ImplicitMethod, Solution
from mlo.hypergradient.scaling import Scale, is_scale, scale_factors
from mlo.linear_system import LinearSystem
from mlo.options import is_count
from mlo.status import Status
from mlo.vectors import add, norm, scale, subtract, zeros_like


@dataclass(frozen=True)
class SOBA(ImplicitMethod):
    """λ ← λ + S (c − H λ), `steps` times, from the λ of the outer step before.

    S = `scale`·I. The three variables of a bilevel problem move together: θ by the stage's optimizer, λ by this, x by
    the upper one's. At fixed θ and c the iterates converge to H⁻¹c where every eigenvalue of H is in (0, 2/scale), by a
    factor of max |1 − scale·eigenvalue| per step; in training they follow it as long as θ and x move slowly. With
    `steps` > 1 it is the inner loop of AmIGO. In a nested graph λ is kept for the gradient itself; solves that products
    of a stage above ask for begin from 0. With four levels or more one gradient moves λ more than once.

    Args:
        steps: how many steps per outer step, at least 1.
        scale: the step size ρ, or `None` for the learning rate of each parameter group of the stage.
        product: how products are formed.
        on_breakdown: see `HypergradientMethod`. Breaks down where the residual has grown past a thousand times c,
            and on non-finite values; λ then starts again from 0.

    Raises:
        ConfigurationError: an option is out of range.

    Cost: one Hessian–vector product per step and one mixed product. Memory: the graph of the gradient and three vectors
    of the stage's size, one of them kept.

    Source: Dagréou, Ablin, Vaiter and Moreau, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms" (SOBA), NeurIPS 2022; Arbel and Mairal, "Amortized implicit differentiation for
    stochastic bilevel optimization" (AmIGO), ICLR 2022.

    >>> import mlo, torch
    >>> kept, found = {}, []
    >>> for _ in range(3):                                # w*(x) = x / 2 and H = 2
    ...     x = torch.tensor(3.0, requires_grad=True)
    ...     w = mlo.best_response(lambda w, x: w**2 - w * x, x.detach() / 2, x, mlo.SOBA(scale=0.25), warm_starts=kept)
    ...     found.append(torch.autograd.grad(w, x)[0].item())
    >>> found                                             # (1 − ½ᵏ) / 2
    [0.25, 0.375, 0.4375]

    """

    steps: int = 1
    scale: Scale = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not is_count(self.steps):
            raise self.option_error("steps", "an integer of at least 1")
        if not is_scale(self.scale):
            raise self.option_error("scale", "a positive number, or None for the stage's learning rate")

    @property
    def needs_learning_rate(self) -> bool:
        """Whether the scale is the stage's learning rate."""
        return self.scale is None

    @property
    def keeps_solutions(self) -> bool:
        """Whether solves start from the solution of the step before: it is what the method lives on."""
        return True

    def solve(self, system: LinearSystem) -> Solution:
        """Return λ after some steps from the last one."""
        factors = scale_factors(self, self.scale, system)
        size = system.rhs_norm
        adjoint = system.last_solution or zeros_like(system.rhs)
        left = size
        for _ in range(self.steps):
            residual = subtract(system.rhs, system.product(adjoint))
            left = norm(residual)
            adjoint = add(adjoint, scale(residual, factors))
        relative = left / size if size else 0.0
        if not (math.isfinite(size) and math.isfinite(left) and math.isfinite(norm(adjoint))):
            return Solution(adjoint, Status.NON_FINITE, self.steps, relative)
        # Where c has shrunk to nothing, λ is still on its way there.
        status = Status.DIVERGED if size and relative > _HOPELESS else Status.TRUNCATED
        return Solution(adjoint, status, self.steps, relative)


_HOPELESS = 1e3
