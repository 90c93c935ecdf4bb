"""Interleaving chains: stage after stage, each held near earlier ones, all under weights of examples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlo.bench.problems.dense import dense_hypergradient, solved
from mlo.bench.problems.family import Family, Request, vector_module
from mlo.bench.stage import Case, Stage, View

#: Who reads whom: every stage reads the upper problem.
TOPOLOGIES = {
    "last": "each stage reads the one before, the upper problem the last one",
    "all": "each stage reads the one before, the upper problem all",
    "dense": "each stage reads all earlier ones, the upper problem all",
}
LENGTHS = (2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64)

_WEIGHTS, _EXAMPLES = 20, 40


def _train(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    """¼ mean sigmoid(aᵢ)(xᵢ·w − yᵢ)² + 1/20 ‖w‖² + ½ mean ‖w − w_d‖² over the stages d that are read.

    The Hessians are well conditioned: otherwise a few steps of conjugate gradients would differ between any two orders
    of summation. What comes from one stage to the next shrinks little, so that 64 stages leave something to compute.
    """
    (x, y), weights = batch, own.params["w"]
    examples = others["upper"].params["logit"].sigmoid()
    loss: Tensor = 0.25 * (examples * (x @ weights - y).square()).mean() + 0.05 * weights.square().sum()
    earlier = [view.params["w"] for name, view in others.items() if name != "upper"]
    for w in earlier:
        loss = loss + 0.5 / len(earlier) * (weights - w).square().sum()
    return loss


def _validate(_: View, others: Mapping[str, View], batch: Any) -> Tensor:
    x, y = batch
    losses = [0.5 * (x @ view.params["w"] - y).square().mean() for view in others.values()]
    return torch.stack(losses).mean()


def build(request: Request) -> Case:
    """Return the case at its solution."""
    topology, length = request.size.split("-")
    generator = torch.Generator().manual_seed(request.seed)
    truth = torch.randn(_WEIGHTS, generator=generator, dtype=torch.float64)

    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(_EXAMPLES, _WEIGHTS, generator=generator, dtype=torch.float64)
        return x, x @ truth + torch.randn(_EXAMPLES, generator=generator, dtype=torch.float64)

    names = [f"stage_{i}" for i in range(1, int(length) + 1)]
    stages = [
        Stage(
            name,
            vector_module(w=torch.zeros(_WEIGHTS, dtype=torch.float64)),
            _train,
            (*(names[:i] if topology == "dense" else names[max(0, i - 1) : i]), "upper"),
            batches=(sample(),),
            learning_rate=0.2,
        )
        for i, name in enumerate(names)
    ]
    logit = torch.randn(_EXAMPLES, generator=generator, dtype=torch.float64)
    upper = Stage(
        "upper",
        vector_module(logit=logit),
        _validate,
        (names[-1],) if topology == "last" else tuple(names),
        batches=(sample(),),
        learning_rate=0.05,
        optimizer="adam",
    )
    placed = solved((*stages, upper))
    return Case("chain", request.size, placed, partial(dense_hypergradient, placed))


FAMILY = Family(
    "chain",
    "interleaving chains of K stages in three topologies",
    tuple(f"{topology}-{length}" for topology in TOPOLOGIES for length in LENGTHS),
    build,
)
