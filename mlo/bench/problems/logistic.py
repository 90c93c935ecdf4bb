"""Logistic regression with one penalty per weight."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlo.bench.problems.data import breast_cancer, digits, parts
from mlo.bench.problems.dense import dense_hypergradient, solved
from mlo.bench.problems.family import Family, Request, vector_module, zero_linear
from mlo.bench.stage import Case, Stage, View


def _train(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    """Cross-entropy + ½ Σ exp(λᵢ) wᵢ² over all weights and biases."""
    x, y = batch
    penalties = others["penalties"].params
    penalty = sum((penalties[name].exp() * w.square()).sum() for name, w in own.params.items())
    return F.cross_entropy(own(x), y) + 0.5 * penalty


def _validate(_: View, others: Mapping[str, View], batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(others["weights"](x), y)


def build(request: Request) -> Case:
    """Return the case at the solution by Newton's method."""
    size, seed = request.size, request.seed
    train, held_out = parts(digits() if size == "digits" else breast_cancer(), (0.4, 0.4), seed)
    inputs, classes = train.x.shape[1], int(train.y.max()) + 1
    generator = torch.Generator().manual_seed(seed + 1)
    penalties = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) - 4
        for name, p in nn.Linear(inputs, classes).named_parameters()
    }
    stages = solved(
        (
            Stage(
                "weights",
                zero_linear(inputs, classes),
                _train,
                ("penalties",),
                batches=(tuple(train),),
                learning_rate=0.5,
                momentum=0.9,
                steps=10,
            ),
            Stage(
                "penalties",
                vector_module(**penalties),
                _validate,
                ("weights",),
                batches=(tuple(held_out),),
                learning_rate=0.05,
                optimizer="adam",
            ),
        )
    )
    return Case("logistic", size, stages, partial(dense_hypergradient, stages))


FAMILY = Family("logistic", "logistic regression with one penalty per weight", ("breast-cancer", "digits"), build)
