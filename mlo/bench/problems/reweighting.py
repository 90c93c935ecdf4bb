"""Reweighting of examples by a small network, in the style of Meta-Weight-Net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlo.bench.problems.data import Data, digits, fashion_mnist, parts
from mlo.bench.problems.family import Family, Request, seeded
from mlo.bench.stage import Case, Stage, View

_BATCH = 128
_HIDDEN = {"digits": 64, "random": 128, "random-decay": 128, "fashion-mnist": 128}
# Noise in the labels, as in data hyper-cleaning.
_CORRUPTED = 0.4


def _train(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    """The mean of sigmoid(V(ℓᵢ))·ℓᵢ with ℓᵢ the cross-entropy of an example.

    Unlike in the paper, gradients flow through V's argument as well: with a stop-gradient there, central differences in
    the weights are wrong in every library.
    """
    x, y = batch
    losses = F.cross_entropy(own(x), y, reduction="none")
    weights = torch.sigmoid(others["weighting"](losses[:, None])).squeeze(1)
    return (weights * losses).mean()


def _train_with_decay(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    """The same + ½‖w‖², with which the Hessian at random weights was seen to be positive definite."""
    return _train(own, others, batch) + 0.5 * sum(w.square().sum() for w in own.params.values())


def _validate(_: View, others: Mapping[str, View], batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(others["classifier"](x), y)


def _data(request: Request) -> list[Data]:
    size, seed = request.size, request.seed
    if size == "digits":
        return parts(digits(), (0.5, 0.4), seed)
    if size == "fashion-mnist":
        return parts(fashion_mnist(request.data), (0.2, 0.02), seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * _BATCH, 784, generator=generator, dtype=torch.float64)
    return parts(Data(x, torch.randint(10, (len(x),), generator=generator)), (2 / 3, 1 / 3), seed)


def _batches(data: Data) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return whole batches, in order."""
    return tuple((data.x[i], data.y[i]) for i in torch.split(torch.arange(len(data.y)), _BATCH) if len(i) == _BATCH)


def build(request: Request) -> Case:
    """Return the case at random weights: 784-128-10 (101,770 weights) except for "digits"."""
    size, seed = request.size, request.seed
    train, held_out = _data(request)
    generator = torch.Generator().manual_seed(seed + 1)
    noisy = torch.rand(len(train.y), generator=generator) < _CORRUPTED
    train = Data(train.x, torch.where(noisy, torch.randint(10, train.y.shape, generator=generator), train.y))
    inputs, hidden = train.x.shape[1], _HIDDEN[size]
    stages = (
        Stage(
            "classifier",
            seeded(lambda: nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10)), seed),
            _train_with_decay if size == "random-decay" else _train,
            ("weighting",),
            batches=_batches(train),
            learning_rate=0.05,
            momentum=0.9,
        ),
        Stage(
            "weighting",
            seeded(lambda: nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1)), seed + 1),
            _validate,
            ("classifier",),
            batches=_batches(held_out),
            learning_rate=1e-3,
            optimizer="adam",
        ),
    )
    return Case("reweighting", size, stages)


FAMILY = Family(
    "reweighting",
    "examples weighted by a small network (Meta-Weight-Net style), an MLP below",
    tuple(_HIDDEN),
    build,
)
