"""Solutions and exact hypergradients of cases by dense linear algebra, for stages that are not nested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mlo.bench.libraries.functional import FunctionalView
from mlo.bench.problems.family import with_weights
from mlo.bench.stage import Gradient, Stage
from mlo.testing.flat import joined, separated_by_shape
from mlo.testing.level import Level

_MOST_STEPS = 30
# The error after a step of Newton's method is about the square of its length.
_CLOSE = 1e-11
_SHORT = 1e-12


def solved(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return convex stages at their solutions by Newton's method, each with 1/λmax as its scale.

    The upper stage, the last one, stays where it is.

    Raises:
        ArithmeticError: Newton's method does not solve a stage.

    """
    levels = _levels(stages)
    values = {levels[-1].name: levels[-1].start}
    found = []
    for stage, level in zip(stages[:-1], levels[:-1], strict=True):
        others = {name: values[name] for name in level.reads}
        values[level.name], hessian = _newton(level, others)
        solution = _named(stage.module(), values[level.name])
        found.append(
            replace(
                stage,
                module=with_weights(stage.module, solution),
                initial=stage.initial or stage.module,
                scale=1 / float(torch.linalg.eigvalsh(hessian)[-1]),
            )
        )
    return (*found, stages[-1])


def _newton(level: Level, others: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the solution and the Hessian there (at the point before the last step, which is as good)."""
    theta = level.start
    for _ in range(_MOST_STEPS):
        hessian = _jacobian(level, theta, others)
        gradient = level.gradient(theta, others)
        step = torch.linalg.solve(hessian, gradient)
        before, slope = level.loss(theta, others, {}), gradient @ step
        # Armijo's rule; a loss cannot tell short steps from rounding.
        while slope > _SHORT and not level.loss(theta - step, others, {}) <= before - 1e-4 * slope:
            step, slope = step / 2, slope / 2
        theta = theta - step
        if torch.linalg.vector_norm(step) <= _CLOSE * (1 + torch.linalg.vector_norm(theta)):
            return theta, hessian
    raise ArithmeticError(f"stage {level.name!r}: Newton's method has not converged in {_MOST_STEPS} steps.")


def dense_hypergradient(stages: Sequence[Stage]) -> Gradient:
    """Return the hypergradient of the upper stage by a reverse sweep with explicit Hessians.

        λ = J⁻ᵀ c,   c_d ← c_d − (∂g/∂θ_d)ᵀ λ        beginning with c_d = ∂F/∂θ_d

    Cost: the Jacobian J of each stage's gradient g written out, and solved.
    """
    levels = _levels(stages)
    values, top = {level.name: level.start for level in levels}, levels[-1]
    cotangents = torch.func.grad(lambda given: top.loss(given[top.name], given, {}))(values)
    for level in reversed(levels[:-1]):
        others = {name: values[name] for name in level.reads}
        adjoint = torch.linalg.solve(_jacobian(level, level.start, others).T, cotangents[level.name])
        pullback = torch.func.vjp(lambda given, level=level: level.gradient(level.start, given), others)[1]
        for name, change in pullback(adjoint)[0].items():
            cotangents[name] = cotangents[name] - change
    return _named(stages[-1].module(), cotangents[top.name])


def _jacobian(level: Level, at: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = torch.func.jacfwd(lambda v: level.gradient(v, others))(at)
    return found


def _levels(stages: Sequence[Stage]) -> list[Level]:
    """Return the stages as functions of vectors."""
    modules = {stage.name: stage.module() for stage in stages}
    return [_level(stage, modules) for stage in stages]


def _level(stage: Stage, modules: Mapping[str, nn.Module]) -> Level:
    def loss(own: Tensor, others: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> Tensor:
        views = {name: _view(modules[name], others[name]) for name in stage.reads}
        view = _view(modules[stage.name], own)
        return torch.stack([stage.loss(view, views, batch) for batch in stage.batches]).mean()

    start = joined([p.detach() for p in modules[stage.name].parameters()])
    return Level(stage.name, stage.reads, loss, start)


def _view(module: nn.Module, value: Tensor) -> FunctionalView:
    return FunctionalView(module, _named(module, value))


def _named(module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    return dict(zip(named, separated_by_shape(value, [tuple(p.shape) for p in named.values()]), strict=True))
