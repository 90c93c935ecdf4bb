"""Re-solving a hierarchy of stages, nested levels included, without any hypergradient method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mlo.errors import ConfigurationError
from mlo.testing.solver import Equation, Solver

#: One vector per problem: all its parameters, joined.
Values = Mapping[str, Tensor]


class Hierarchy(ABC):
    """Losses of several problems that read each other, as functions of one vector per problem."""

    @abstractmethod
    def inner(self, name: str) -> Sequence[str]:
        """Return the stages whose solution depends on `name` and that its loss reads, in the order of solving them.

        Each is solved for given values of `name` and of those before it in the sequence.
        """

    @abstractmethod
    def loss(self, name: str, values: Values) -> float:
        """Return the loss L of a problem."""

    @abstractmethod
    def partials(self, name: str, values: Values) -> dict[str, Tensor]:
        """Return ∂L/∂v for the problem's own vector and for each one in `values` that L reads directly.

        In grad mode the results are functions of `values` that can be differentiated any number of times.
        """

    @abstractmethod
    def stationarity(self, name: str, gradient: Tensor, own: Tensor) -> Tensor:
        """Return what is zero at the solution: the gradient of the loss as the problem's optimizer sees it."""

    @abstractmethod
    def objective(self, name: str, loss: float, own: Tensor) -> float | None:
        """Return the number whose gradient the stationarity is, or `None` where there is none."""

    @abstractmethod
    def takes_part(self, name: str) -> Tensor:
        """Return which entries of the problem's vector its loss reaches."""


class Resolver:
    """Solves the stages of a hierarchy at given values of the others.

    A stage j that is nested over inner stages d minimises its *reduced* loss L_j(θ_j, θ_d*(θ_j, …)), whose gradient
    is ∂L_j/∂θ_j + Σ_d (∂θ_d*/∂θ_j)ᵀ ∂L_j/∂θ_d. The response θ_d* of an inner stage is made a function that autograd
    can differentiate k times by k + 1 steps θ ← θ − M g(θ, values) from its solution, with M the inverse Jacobian
    there as a constant: each step makes one more order of derivatives exact. No implicit function theorem, no
    adjoint system and no method of `mlo` takes part.

    The solutions found are kept as starting points for the next solve, so that all solves of a difference are on
    the same branch.
    """

    def __init__(self, hierarchy: Hierarchy, solvers: Mapping[str, Solver]) -> None:
        """Start without any solution."""
        self._hierarchy, self._solvers = hierarchy, solvers
        self._starts: dict[str, tuple[Tensor, Tensor | None]] = {}

    def solved(self, name: str, values: Values) -> dict[str, Tensor]:
        """Return `values` with all stages that `name` leads re-solved for them."""
        with torch.no_grad():
            return self._with_inner(name, values, 0)

    def reduced_loss(self, name: str, values: Values) -> float:
        """Return the loss of a problem with all stages that it leads re-solved."""
        return self._hierarchy.loss(name, self.solved(name, values))

    def hypergradient(self, name: str, values: Values) -> Tensor:
        """Return the gradient of the reduced loss in the problem's own vector."""
        own = values[name].detach().requires_grad_()
        with torch.enable_grad():
            return self._total_gradient(name, {**values, name: own}, 0).detach()

    def solution(self, name: str, values: Values) -> Tensor:
        """Return θ* of one stage at given values of all that it depends on; its own entry is the first start."""
        given = {n: v.detach() for n, v in values.items()}
        start, inverse = self._starts.get(name, (given[name], None))
        theta, inverse = self._solvers[name].solve(self._equation(name, given), start, inverse)
        self._starts[name] = theta, inverse
        return theta

    def jacobian(self, name: str, values: Values) -> Tensor:
        """Return the Jacobian of a stage's stationarity over the entries that take part."""
        return self._equation(name, values).jacobian(values[name])

    def _equation(self, name: str, given: Values) -> Equation:
        hierarchy = self._hierarchy
        takes_part = hierarchy.takes_part(name)

        def residual(theta: Tensor) -> Tensor:
            own = theta.detach()
            with torch.set_grad_enabled(bool(hierarchy.inner(name))):
                own = own.requires_grad_(torch.is_grad_enabled())
                g = hierarchy.stationarity(name, self._total_gradient(name, {**given, name: own}, 0), own)
            return torch.where(takes_part, g.detach(), torch.zeros_like(g))

        def objective(theta: Tensor) -> float:
            at = {**given, name: theta.detach()}
            found = hierarchy.objective(name, self.reduced_loss(name, at), theta)
            assert found is not None
            return found

        exists = hierarchy.objective(name, 0.0, given[name]) is not None
        return Equation(name, residual, objective if exists else None, takes_part)

    def _with_inner(self, name: str, values: Values, order: int) -> dict[str, Tensor]:
        found = dict(values)
        for d in self._hierarchy.inner(name):
            found[d] = self._response(d, found, order)
        return found

    def _response(self, name: str, values: Values, order: int) -> Tensor:
        """Return θ* as a function of `values` whose derivatives up to `order` are exact."""
        theta = self.solution(name, values)
        if order == 0:
            return theta
        if not self._solvers[name].forms_jacobian:
            raise ConfigurationError(
                f"stage {name!r} is nested in another one, so that its response has to be differentiated; expected "
                f"mlo.testing.Newton() as its solver, got {type(self._solvers[name]).__name__}."
            )
        given = {n: v.detach() for n, v in values.items()}
        inverse = self._equation(name, given).inverse(theta)
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            for _ in range(order + 1):
                total = self._total_gradient(name, {**values, name: theta}, order)
                theta = theta - inverse @ self._hierarchy.stationarity(name, total, theta)
        return theta

    def _total_gradient(self, name: str, values: Values, order: int) -> Tensor:
        """Return the gradient of the reduced loss, a function that can be differentiated `order` times."""
        inner = self._hierarchy.inner(name)
        if not inner:
            return self._hierarchy.partials(name, values)[name]
        own = values[name]
        at = self._with_inner(name, values, order + 1)
        partials = self._hierarchy.partials(name, at)
        read = [d for d in inner if d in partials]
        total = partials[name]
        if read:
            (indirect,) = torch.autograd.grad(
                [at[d] for d in read],
                [own],
                [partials[d] for d in read],
                create_graph=order > 0,
                retain_graph=True,
                allow_unused=True,
            )
            total = total if indirect is None else total + indirect
        return total


def solvers_for(names: Iterable[str], solver: Solver | Mapping[str, Solver], default: Solver) -> dict[str, Solver]:
    """Return one solver for each stage."""
    if not isinstance(solver, Solver | Mapping):
        raise ConfigurationError(
            f"solve={solver!r}: expected a solver such as mlo.testing.Newton(), or a mapping from names of stages to "
            "solvers."
        )
    given = {} if isinstance(solver, Solver) else dict(solver)
    names = tuple(names)
    for name, each in given.items():
        if name not in names or not isinstance(each, Solver):
            raise ConfigurationError(
                f"solve={{{name!r}: {each!r}}}: expected a solver such as mlo.testing.Newton() for some of the stages "
                f"{', '.join(map(repr, names)) or '(there are none)'}."
            )
    return {name: solver if isinstance(solver, Solver) else given.get(name, default) for name in names}
