"""Interleaving chains of classifiers of digits: stages of the size at which arithmetic outweighs Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlo.bench.problems.chain import TOPOLOGIES
from mlo.bench.problems.data import digits, parts
from mlo.bench.problems.family import Family, Request, seeded, vector_module
from mlo.bench.stage import Case, Stage, View

LENGTHS = (4, 12, 32)

_PIXELS, _FEATURES, _CLASSES = 64, 256, 10
_EXAMPLES, _HELD_OUT = 1200, 128


def _train(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    """Cross-entropy + ½ Σ exp(λᵢ) mean Wᵢ² + ¼ mean ‖w − w_d‖² over the stages d that are read.

    Convex, and strongly so by its penalties: with a flat direction, a few steps of conjugate gradients would differ
    between any two orders of summation.
    """
    x, y = batch
    weight = own.params["weight"]
    penalties = others["upper"].params["log"].exp()
    loss = F.cross_entropy(own(x), y) + 0.5 * (penalties * weight.square().mean(0)).sum()
    earlier = [view.params["weight"] for name, view in others.items() if name != "upper"]
    for w in earlier:
        loss = loss + 0.25 / len(earlier) * (weight - w).square().sum()
    return loss


def _validate(_: View, others: Mapping[str, View], batch: Any) -> Tensor:
    x, y = batch
    return torch.stack([F.cross_entropy(view(x), y) for view in others.values()]).mean()


def build(request: Request) -> Case:
    """Return the case at random weights: every stage has its own draw of 1,200 digits."""
    topology, length = request.size.split("-")
    train, held_out = parts(digits(), (0.7, 0.3), request.seed)
    generator = torch.Generator().manual_seed(request.seed)
    projection = torch.randn(_PIXELS, _FEATURES, generator=generator, dtype=train.x.dtype) / _PIXELS**0.5
    features, others = ((data.x @ projection).relu() for data in (train, held_out))
    names = [f"stage_{i}" for i in range(1, int(length) + 1)]
    stages = []
    for i, name in enumerate(names):
        drawn = torch.randperm(len(train.y), generator=generator)[:_EXAMPLES]
        stages.append(
            Stage(
                name,
                seeded(lambda: nn.Linear(_FEATURES, _CLASSES, bias=False), request.seed + i),
                _train,
                (*(names[:i] if topology == "dense" else names[max(0, i - 1) : i]), "upper"),
                batches=((features[drawn], train.y[drawn]),),
                learning_rate=0.1,
            )
        )
    upper = Stage(
        "upper",
        vector_module(log=torch.full((_FEATURES,), -1.0, dtype=torch.float64)),
        _validate,
        (names[-1],) if topology == "last" else tuple(names),
        batches=((others[:_HELD_OUT], held_out.y[:_HELD_OUT]),),
        learning_rate=0.05,
        optimizer="adam",
    )
    return Case("digits-chain", request.size, (*stages, upper))


FAMILY = Family(
    "digits-chain",
    "interleaving chains of K classifiers of digits (2,560 weights, 1,200 examples) in three topologies",
    tuple(f"{topology}-{length}" for topology in TOPOLOGIES for length in LENGTHS),
    build,
)
