"""Data hyper-cleaning: some labels are wrong, and one weight per example is to find out which."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlo.bench.problems.data import Data, breast_cancer, digits, fashion_mnist, parts
from mlo.bench.problems.dense import dense_hypergradient, solved
from mlo.bench.problems.family import Family, Request, vector_module, zero_linear
from mlo.bench.stage import Case, Stage, View

#: The fraction of training labels that are replaced by random ones.
CORRUPTED = 0.4

_DECAY = 1e-2
_BATCH = 500


def _train(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    """The mean of sigmoid(aᵢ)·cross-entropyᵢ, + ½·10⁻²‖w‖²."""
    x, y, which = batch
    weights = others["examples"].params["logit"][which].sigmoid()
    losses = F.cross_entropy(own(x), y, reduction="none")
    decay = sum(w.square().sum() for w in own.params.values())
    return (weights * losses).mean() + 0.5 * _DECAY * decay


def _validate(_: View, others: Mapping[str, View], batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(others["weights"](x), y)


def _corrupted(data: Data, classes: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed + 1)
    chosen = torch.rand(len(data.y), generator=generator) < CORRUPTED
    return Data(data.x, torch.where(chosen, torch.randint(classes, data.y.shape, generator=generator), data.y))


def _data(request: Request) -> list[Data]:
    size, seed = request.size, request.seed
    if size == "fashion-mnist":
        return parts(fashion_mnist(request.data), (5000 / 60_000, 1000 / 60_000), seed)
    return parts(digits() if size == "digits" else breast_cancer(), (0.35, 0.35), seed)


def build(request: Request) -> Case:
    """Return the case, at the solution by Newton's method where there are few weights."""
    size, seed = request.size, request.seed
    clean, held_out = _data(request)
    inputs, classes = clean.x.shape[1], int(clean.y.max()) + 1
    train = _corrupted(clean, classes, seed)
    order = torch.arange(len(train.y))
    small = size != "fashion-mnist"
    pieces = [order] if small else list(torch.split(order, _BATCH))
    generator = torch.Generator().manual_seed(seed + 2)
    start = torch.randn(len(order), generator=generator, dtype=torch.float64) if small else torch.zeros(len(order))
    stages: tuple[Stage, ...] = (
        Stage(
            "weights",
            zero_linear(inputs, classes),
            _train,
            ("examples",),
            batches=tuple((train.x[i], train.y[i], i) for i in pieces),
            learning_rate=0.3 if small else 0.03,
            momentum=0.9,
            steps=10,
        ),
        Stage(
            "examples",
            vector_module(logit=start.double()),
            _validate,
            ("weights",),
            batches=(tuple(held_out),),
            learning_rate=0.1,
            optimizer="adam",
        ),
    )
    if not small:
        return Case("cleaning", size, stages)
    stages = solved(stages)
    return Case("cleaning", size, stages, partial(dense_hypergradient, stages))


FAMILY = Family(
    "cleaning",
    "data hyper-cleaning: corrupted labels, one weight per example",
    ("breast-cancer", "digits", "fashion-mnist"),
    build,
)
