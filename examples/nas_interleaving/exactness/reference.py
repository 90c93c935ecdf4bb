"""The exact hypergradient: the slope of the validation loss when all stages are solved again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mlo
from examples.nas_interleaving.exactness.smooth import stages_of
from examples.nas_interleaving.stages import ARCHITECTURE
from mlo.testing import LBFGS, Newton
from mlo.testing.inside import opened
from mlo.testing.resolving import Resolver

# Of a difference of fourth order: its own error is 1e-10 here, and that of rounding less.
_SHIFT = 3e-3
_ROUGH = LBFGS(tolerance=1e-7)


@dataclass(frozen=True)
class Solved:
    """The stages solved to rounding.

    Attributes:
        weights: of each stage, all in one vector.
        slopes: those of the reduced validation loss along the columns of `directions`.
        directions: in the architecture's parameters, all in one vector.

    """

    weights: Mapping[str, Tensor]
    slopes: Tensor
    directions: Tensor


def solve(problems: Sequence[mlo.Problem], directions: Tensor | None = None) -> Solved:
    """Solve all stages for the present architecture, and again for architectures to both sides of it.

    Args:
        problems: of a search that is smooth and in float64. They keep their weights.
        directions: a unit vector per column along which the slope is taken; `None` for each parameter of the
            architecture that has an influence.

    Cost: four solves of all stages per direction, of some gradients each, after two Jacobians per stage.

    """
    engine = mlo.Engine(problems)
    with opened(engine, ARCHITECTURE) as hierarchy:
        start = hierarchy.present()
        rough = Resolver(hierarchy, dict.fromkeys(hierarchy.stages, _ROUGH)).solved(ARCHITECTURE, start)
        resolver = Resolver(hierarchy, dict.fromkeys(hierarchy.stages, Newton()))
        values = resolver.solved(ARCHITECTURE, rough)

        def loss(shift: Tensor) -> float:
            return resolver.reduced_loss(ARCHITECTURE, {**values, ARCHITECTURE: values[ARCHITECTURE] + shift})

        if directions is None:
            directions = torch.eye(len(values[ARCHITECTURE]), dtype=torch.float64)[:, _influential(problems)]
        slopes = [_slope(loss, direction) for direction in directions.T]
    weights = {problem.name: values[problem.name] for problem in stages_of(problems)}
    return Solved(weights, torch.tensor(slopes, dtype=torch.float64), directions)


def _slope(loss: Callable[[Tensor], float], direction: Tensor) -> float:
    """Return the derivative along a direction by a central difference of fourth order."""
    near, far = (loss(h * direction) - loss(-h * direction) for h in (_SHIFT, 2 * _SHIFT))
    return (8 * near - far) / (12 * _SHIFT)


def _influential(problems: Sequence[mlo.Problem]) -> Tensor:
    """Return which parameters of the architecture belong to operations of the space."""
    (module,) = (problem.module for problem in problems if problem.name == ARCHITECTURE)
    return torch.cat([(w > 0).flatten() for w in module.weights().values()])  # type: ignore[operator]


def place(problems: Sequence[mlo.Problem], weights: Mapping[str, Tensor]) -> None:
    """Give the stages a copy of these weights."""
    for problem in stages_of(problems):
        torch.nn.utils.vector_to_parameters(weights[problem.name].clone(), problem.module.parameters())


def weights_of(problems: Sequence[mlo.Problem]) -> dict[str, Tensor]:
    """Return the stages' present weights."""
    return {
        problem.name: torch.nn.utils.parameters_to_vector(problem.module.parameters()).detach().clone()
        for problem in stages_of(problems)
    }
