"""Exact solutions and hypergradients of levels, by plain linear algebra and `torch.func`: no engine takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mlo.testing.level import Level
from mlo.testing.newton import Newton
from mlo.testing.resolving import Hierarchy, Resolver, Values

#: From a stage's Jacobian to the matrix that stands in the place of its inverse.
Inverse = Callable[[Tensor], Tensor]

_MOST_STEPS = 100


def solved_in_order(levels: Sequence[Level]) -> list[Level]:
    """Return the levels with each stage at its solution for those before it and for the upper problem, the last one.

    For graphs in which no stage's solution depends on a stage that comes earlier in the sequence and reads it. Newton's
    method with `torch.func.jacfwd` from each level's start.
    """
    values = {levels[-1].name: levels[-1].start}
    solved = []
    for level in levels[:-1]:
        others = {d: values[d] for d in level.reads}
        theta = level.start
        for _ in range(_MOST_STEPS):
            step = torch.linalg.solve(_jacobian(level, theta, others), level.gradient(theta, others))
            theta = theta - step
            if torch.linalg.vector_norm(step) <= 1e-14 * (1 + torch.linalg.vector_norm(theta)):
                break
        values[level.name] = theta
        solved.append(replace(level, start=theta))
    return [*solved, levels[-1]]


@dataclass(frozen=True)
class Linearised:
    """Levels without nesting, linearised at their starts.

    Attributes:
        stages: the stages' names, in solve order.
        upper: the upper problem's name.
        slopes: ∂F/∂θ of the upper loss F for everything that it reads, itself included.
        jacobians: J = ∂g/∂θ of each stage.
        mixed: G_d = ∂g/∂θ_d of each stage, for each d that it reads.

    """

    stages: tuple[str, ...]
    upper: str
    slopes: Mapping[str, Tensor]
    jacobians: Mapping[str, Tensor]
    mixed: Mapping[str, Mapping[str, Tensor]]

    def reverse_sweep(self, inverse: Inverse = torch.linalg.inv) -> Tensor:
        """Return the upper problem's hypergradient, from the highest stage to the lowest.

            λ = J⁻ᵀ c,   c_d ← c_d − G_dᵀ λ        beginning with c_d = ∂F/∂θ_d

        `inverse` gives what stands in the place of J⁻¹: the exact formula of a truncated method.
        """
        cotangents = dict(self.slopes)
        for stage in reversed(self.stages):
            adjoint = inverse(self.jacobians[stage]).T @ cotangents[stage]
            for d, g in self.mixed[stage].items():
                cotangents[d] = cotangents[d] - g.T @ adjoint
        return cotangents[self.upper]


def linearised(levels: Sequence[Level]) -> Linearised:
    """Linearise levels without nesting, by `torch.func`."""
    values = {level.name: level.start for level in levels}
    top, jacobians, mixed = levels[-1], {}, {}

    def upper(given: Mapping[str, Tensor]) -> Tensor:
        return top.loss(given[top.name], {d: given[d] for d in top.reads}, top.constants)

    for level in levels[:-1]:
        own, others = level.start, {d: values[d] for d in level.reads}
        jacobians[level.name] = _jacobian(level, own, others)
        mixed[level.name] = torch.func.jacrev(lambda given, level=level, own=own: level.gradient(own, given))(others)
    stages = tuple(level.name for level in levels[:-1])
    return Linearised(stages, top.name, torch.func.grad(upper)(values), jacobians, mixed)


def solved_nested(levels: Sequence[Level]) -> tuple[list[Level], Tensor, float]:
    """Return the levels at their solutions, the hypergradient of the last one, and the stages' condition numbers added.

    For graphs in which every level reads all others: each stands inside the gradients of those above it.
    """
    resolver = Resolver(_Nested(levels), {level.name: Newton() for level in levels[:-1]})
    top = levels[-1].name
    values = resolver.solved(top, {level.name: level.start for level in levels})
    gradient = resolver.hypergradient(top, values)
    solved = [replace(level, start=values[level.name]) for level in levels]
    return solved, gradient, sum(_condition(resolver.jacobian(level.name, values)) for level in levels[:-1])


def nested_sweep(levels: Sequence[Level], inverse: Inverse) -> Tensor:
    """Return the hypergradient of the last level where `inverse` gives what stands in the place of each stage's J⁻¹.

    For levels at their solutions that all read each other. The response of a stage is a function whose cotangents are
    −Gᵀ λ with λ = inverse(J)ᵀ c, for J and G of the stage's *reduced* loss; and the derivative of λ, which J of a stage
    above needs, is λ′ = inverse(J)ᵀ (c′ − J′ᵀ λ): that of a solve, whatever stands in the place of J⁻¹.
    """
    hierarchy, top = _Nested(levels), levels[-1].name
    values = {level.name: level.start for level in levels}
    own = values[top].clone().requires_grad_()
    with torch.enable_grad():
        return _reduced_gradient(hierarchy, inverse, top, {top: own}, values).detach()


def _reduced_gradient(
    hierarchy: _Nested, inverse: Inverse, name: str, given: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Tensor:
    """Return the gradient of a level's reduced loss at `values`, a differentiable function of the `given` ones."""
    at = dict(given)
    for d in hierarchy.inner(name):
        at[d] = _Response.apply((hierarchy, inverse, d, tuple(at), values), values[d], *at.values())  # type: ignore[no-untyped-call]
    loss = hierarchy.tensor_loss(name, at)
    (total,) = torch.autograd.grad(loss, [at[name]], create_graph=True)
    own: Tensor = total
    return hierarchy.stationarity(name, own, at[name])


class _Response(torch.autograd.Function):
    """A stage's solution as a function of everything above it."""

    @staticmethod
    def forward(ctx: Any, stage: tuple[Any, ...], theta: Tensor, *above: Tensor) -> Tensor:
        ctx.stage = stage
        theta = theta.clone()
        ctx.save_for_backward(theta, *above)
        return theta

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        hierarchy, inverse, name, names, values = ctx.stage
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, so that a derivative is taken in this argument only.
            theta, *above = (
                t.view_as(t) if differentiable and t.requires_grad else t.detach().requires_grad_()
                for t in ctx.saved_tensors
            )
            g = _reduced_gradient(
                hierarchy, inverse, name, {**dict(zip(names, above, strict=True)), name: theta}, values
            )
            rows = [torch.autograd.grad(entry, theta, create_graph=True)[0] for entry in g]
            adjoint = _Solve.apply(inverse, torch.stack(rows), cotangent)  # type: ignore[no-untyped-call]
            found = torch.autograd.grad(g, above, adjoint, create_graph=differentiable)
        return None, None, *(t.neg() for t in found)


class _Solve(torch.autograd.Function):
    """(J, c) ↦ J⁻ᵀ c with the derivative of a solve, where something else may stand in the place of J⁻¹."""

    @staticmethod
    def forward(ctx: Any, inverse: Inverse, jacobian: Tensor, c: Tensor) -> Tensor:
        adjoint = inverse(jacobian).T @ c
        ctx.inverse = inverse
        ctx.save_for_backward(jacobian, adjoint)
        return adjoint

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor, Tensor]:
        jacobian, adjoint = ctx.saved_tensors
        mu = _Solve.apply(ctx.inverse, jacobian.T, cotangent)  # type: ignore[no-untyped-call]
        return None, -torch.outer(adjoint, mu), mu


@dataclass(frozen=True)
class Eliminated:
    """Nested quadratic levels solved from below.

    Attributes:
        values: all numbers v, level after level, at the solutions for given numbers of the upper problem.
        gradient: that of the upper problem's reduced loss.
        condition: the condition numbers of the stages' reduced Hessians added.

    """

    values: Tensor
    gradient: Tensor
    condition: float


def eliminated(quadratics: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> Eliminated:
    """Solve nested levels with losses ½ vᵀQv + bᵀv in all their numbers v at once, the last one at x.

    From the lowest level up, v is an affine function S u + s of the numbers u that are left. The level's own numbers o
    leave u = (o, r) by their stationarity

        (SᵀQS)_oo o + (SᵀQS)_or r + (Sᵀ(Qs + b))_o = 0,

    so that in the end v = S x + s, and the upper problem's reduced gradient is Sᵀ(Qv + b).

    Args:
        quadratics: Q and b of each level, lowest first, each level with as many numbers as `x`.
        x: the upper problem's numbers.

    """
    n, total = len(x), len(x) * len(quadratics)
    s, shift = torch.eye(total, dtype=x.dtype), torch.zeros(total, dtype=x.dtype)
    conditions = 0.0
    for q, b in quadratics[:-1]:
        reduced, linear = s.T @ q @ s, s.T @ (q @ shift + b)
        own = reduced[:n, :n]
        conditions += _condition(own)
        shift = shift - s[:, :n] @ torch.linalg.solve(own, linear[:n])
        s = s[:, n:] - s[:, :n] @ torch.linalg.solve(own, reduced[:n, n:])
    q, b = quadratics[-1]
    values = s @ x + shift
    return Eliminated(values, s.T @ (q @ values + b), conditions)


def condition(linear: Linearised) -> float:
    """Return the condition numbers of all stages added: how much a relative residual is magnified at most."""
    return sum(_condition(jacobian) for jacobian in linear.jacobians.values())


def _jacobian(level: Level, own: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = torch.func.jacfwd(lambda v: level.gradient(v, others))(own)
    return found


def _condition(matrix: Tensor) -> float:
    return float(torch.linalg.cond(matrix))


class _Nested(Hierarchy):
    """Levels of which each one leads all below it."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self._levels = {level.name: level for level in levels}
        self._names = tuple(level.name for level in levels)

    def inner(self, name: str) -> tuple[str, ...]:
        return self._names[: self._names.index(name)][::-1]

    def loss(self, name: str, values: Values) -> float:
        return self.tensor_loss(name, values).item()

    def partials(self, name: str, values: Values) -> dict[str, Tensor]:
        differentiable = torch.is_grad_enabled()
        owners = [name, *(d for d in self._levels[name].reads if d in values)]
        with torch.enable_grad():
            # Aliases, so that a derivative is taken in this argument only, whatever else depends on it.
            at = {n: v.view_as(v) if v.requires_grad else v.detach().requires_grad_() for n, v in values.items()}
            loss = self.tensor_loss(name, at)
            found = torch.autograd.grad(loss, [at[q] for q in owners], create_graph=differentiable, allow_unused=True)
        return {q: torch.zeros_like(at[q]) if g is None else g for q, g in zip(owners, found, strict=True)}

    def stationarity(self, name: str, gradient: Tensor, own: Tensor) -> Tensor:
        level = self._levels[name]
        return (-gradient if level.maximise else gradient) + level.decay * own

    def objective(self, name: str, loss: float, own: Tensor) -> float | None:
        return None

    def takes_part(self, name: str) -> Tensor:
        return torch.ones_like(self._levels[name].start, dtype=torch.bool)

    def tensor_loss(self, name: str, values: Values) -> Tensor:
        """Return the loss as a differentiable function of `values`."""
        level = self._levels[name]
        return level.loss(values[name], {d: values[d] for d in level.reads}, level.constants)
