"""Implicit MAML: tasks whose weights are held near common ones, which are learnt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlo.bench.problems.data import digits
from mlo.bench.problems.dense import dense_hypergradient, solved
from mlo.bench.problems.family import Family, Request, vector_module
from mlo.bench.stage import Case, Stage, View

_WAYS, _SHOTS, _QUERIES, _FEATURES = 5, 5, 10, 16
_PROXIMITY = 0.1


def _task_losses(weights: Tensor, batch: Any) -> Tensor:
    """Return the mean cross-entropy of all tasks, with one matrix of weights per task."""
    x, y = batch
    return F.cross_entropy((x @ weights.mT).flatten(0, 1), y.flatten())


def _train(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    """The tasks' cross-entropies + ½·0.1‖w_t − θ‖², added over the tasks."""
    weights = own.params["w"]
    distance = (weights - others["meta"].params["w"]).square().sum()
    return len(weights) * _task_losses(weights, batch) + 0.5 * _PROXIMITY * distance


def _validate(_: View, others: Mapping[str, View], batch: Any) -> Tensor:
    return _task_losses(others["tasks"].params["w"], batch)


def _tasks(count: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return support and query sets of tasks, each over 5 of the 10 digits, on 16 fixed random features and a 1."""
    data, generator = digits(), torch.Generator().manual_seed(seed)
    mix = torch.randn(data.x.shape[1], _FEATURES - 1, generator=generator, dtype=torch.float64) / 8
    features = torch.cat([data.x @ mix, torch.ones(len(data.x), 1, dtype=torch.float64)], 1)
    chosen = []
    for _ in range(count):
        for digit in torch.randperm(10, generator=generator)[:_WAYS].tolist():
            rows = torch.nonzero(data.y == digit).squeeze(1)
            chosen.append(rows[torch.randperm(len(rows), generator=generator)[: _SHOTS + _QUERIES]])
    rows = torch.stack(chosen).view(count, _WAYS, _SHOTS + _QUERIES)
    classes = torch.arange(_WAYS)[:, None].expand(count, _WAYS, _SHOTS + _QUERIES)
    support, query = slice(None, _SHOTS), slice(_SHOTS, None)
    sets = [
        (features[rows[:, :, part]].flatten(1, 2), classes[:, :, part].flatten(1, 2).contiguous())
        for part in (support, query)
    ]
    return sets[0], sets[1]


def build(request: Request) -> Case:
    """Return the case at the tasks' solutions, found by Newton's method."""
    count = int(request.size.removesuffix("-tasks"))
    support, query = _tasks(count, request.seed)
    generator = torch.Generator().manual_seed(request.seed + 1)
    meta = 0.1 * torch.randn(_WAYS, _FEATURES, generator=generator, dtype=torch.float64)
    stages = solved(
        (
            Stage(
                "tasks",
                vector_module(w=meta.expand(count, -1, -1)),
                _train,
                ("meta",),
                batches=(support,),
                learning_rate=0.3,
                momentum=0.9,
                steps=10,
            ),
            Stage(
                "meta",
                vector_module(w=meta),
                _validate,
                ("tasks",),
                batches=(query,),
                learning_rate=0.05,
                optimizer="adam",
            ),
        )
    )
    return Case("maml", request.size, stages, partial(dense_hypergradient, stages))


FAMILY = Family("maml", "implicit MAML on digits: 5 ways, 5 shots", ("4-tasks", "8-tasks"), build)
