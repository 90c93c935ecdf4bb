"""Nested levels: the loss of a level in between contains the response of the one below, which depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mlo.bench.problems.family import Family, Request, vector_module
from mlo.bench.stage import Case, Loss, Stage, View
from mlo.testing import zoo
from mlo.testing.level import Level

_KINDS = {"quadratic-3": (zoo.nested_quadratic, 3), "curved-3": (zoo.nested, 3)}


def _loss_of(level: Level) -> Loss:
    def loss(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
        return level.loss(own.params["v"], {name: view.params["v"] for name, view in others.items()}, batch)

    return loss


def build(request: Request) -> Case:
    """Return a problem of `mlo.testing.zoo` with its exact answer, by elimination or dense recursion. No seed."""
    make, depth = _KINDS[request.size]
    problem = make(depth)
    stages = tuple(
        Stage(
            level.name,
            vector_module(v=level.start),
            _loss_of(level),
            level.reads,
            batches=(dict(level.constants),),
            learning_rate=problem.learning_rate,
            steps=3,
        )
        for level in problem.levels
    )
    return Case("nested", request.size, stages, lambda: {"v": problem.gradient}, nested=True)


FAMILY = Family("nested", "three nested levels", tuple(_KINDS), build)
