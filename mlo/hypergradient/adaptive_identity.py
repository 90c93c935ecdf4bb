"""The inverse Hessian replaced by the preconditioner of the stage's own optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlo.hypergradient.implicit import ImplicitMethod, Solution
from mlo.linear_system import LinearSystem
from mlo.status import Status
from mlo.vectors import norm


@dataclass(frozen=True)
class AdaptiveIdentity(ImplicitMethod):
    """H⁻¹ ≈ P, the diagonal ∂u/∂g of the optimizer's update: c ↦ −Gᵀ P c (SAMA).

    With θ⁺ = θ − u(g) the step that the stage's optimizer would take next, from its present state and gradient, it is
    the derivative of that step: ∂θ⁺/∂x = −P·G. For SGD P is the learning rate, so that it is `Identity(scale=None)`;
    for Adam, AdamW, RMSprop and Adagrad each parameter has a scale of its own, of the size of 1/√v.

    Exact where H = P⁻¹, and like `Identity` a better or worse direction elsewhere: close to H⁻¹c as far as the
    optimizer's preconditioner is close to H⁻¹. There is nothing to converge.

    Args:
        product: how Gᵀ P c is formed; the paper uses `CentralDifferences()`.
        on_breakdown: see `HypergradientMethod`. Breaks down on non-finite values only.

    Raises:
        ConfigurationError: the stage's optimizer is not SGD, Adam, AdamW, RMSprop or Adagrad of torch.

    Cost: no Hessian–vector product, one mixed product; one step of the optimizer's arithmetic. Memory: the graph of the
    gradient, and two vectors of the stage's size beside a copy of the optimizer's state.

    Source: Choe, Mehta, Ahn, Neiswanger, Xie, Strubell and Xing, "Making scalable meta learning practical" (SAMA),
    NeurIPS 2023.

    >>> import mlo, torch
    >>> class Stage(mlo.Problem):
    ...     def training_step(self, batch):               # w*(x) = x / 2 and H = 2
    ...         w, x = self.params["w"], self.deps.upper.params["x"]
    ...         return (w**2 - w * x).sum()
    >>> class Upper(mlo.Problem):
    ...     def training_step(self, batch):
    ...         return self.deps.stage.params["w"].sum()
    >>> low, top = (torch.nn.ParameterDict({name: torch.ones(1)}) for name in "wx")
    >>> adagrad = torch.optim.Adagrad(low.parameters(), lr=0.8, initial_accumulator_value=3.0)
    >>> stage = Stage("stage", low, optimizer=adagrad, depends_on=["upper"], hypergradient=mlo.AdaptiveIdentity())
    >>> engine = mlo.Engine([stage, Upper("upper", top, depends_on=["stage"])])
    >>> round(engine.hypergradient("upper")["x"].item(), 6)   # g = 1, v = 3 + g², ∂u/∂g = 0.8 (v − g²) / v^1.5
    0.3

    """

    @property
    def needs_update_derivative(self) -> bool:
        """Whether the method asks for the derivative of the optimizer's update."""
        return True

    def solve(self, system: LinearSystem) -> Solution:
        """Return P c."""
        adjoint = tuple(p * c for p, c in zip(system.update_derivative(), system.rhs, strict=True))
        status = Status.APPROXIMATE if math.isfinite(norm(adjoint)) else Status.NON_FINITE
        return Solution(adjoint, status, iterations=0, relative_residual=None)
