"""Ridge regression with one penalty per coordinate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlo.bench.problems.data import Data, breast_cancer, parts, synthetic_regression
from mlo.bench.problems.family import Family, Request, vector_module
from mlo.bench.stage import Case, Gradient, Stage, View


def _train(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    """½ mean (x·w − y)² + ½ Σ exp(λᵢ) wᵢ²."""
    x, y = batch
    w = own.params["w"]
    loss: Tensor = (
        0.5 * (x @ w - y).square().mean() + 0.5 * (others["penalties"].params["log"].exp() * w.square()).sum()
    )
    return loss


def _validate(_: View, others: Mapping[str, View], batch: Any) -> Tensor:
    x, y = batch
    loss: Tensor = 0.5 * (x @ others["weights"].params["w"] - y).square().mean()
    return loss


def _data(request: Request) -> list[Data]:
    size, seed = request.size, request.seed
    if size == "breast-cancer":
        x, y = breast_cancer()
        return parts(Data(x, 2.0 * y.double() - 1), (0.5, 0.5), seed)
    columns = int(size)
    return parts(synthetic_regression(4 * columns, columns, seed), (0.5, 0.5), seed)


def build(request: Request) -> Case:
    """Return the case at the closed form's solution."""
    size, seed = request.size, request.seed
    train, held_out = _data(request)
    rows, columns = train.x.shape
    generator = torch.Generator().manual_seed(seed + 1)
    log = torch.randn(columns, generator=generator, dtype=torch.float64) - 2
    hessian = train.x.T @ train.x / rows + torch.diag(log.exp())
    w = torch.linalg.solve(hessian, train.x.T @ train.y / rows)
    largest = float(torch.linalg.eigvalsh(hessian)[-1])

    def exact() -> Gradient:
        """dF/dλᵢ = −exp(λᵢ) wᵢ [H⁻¹ ∂F/∂w]ᵢ."""
        slope = held_out.x.T @ (held_out.x @ w - held_out.y) / len(held_out.y)
        return {"log": -log.exp() * w * torch.linalg.solve(hessian, slope)}

    return Case(
        "ridge",
        size,
        (
            Stage(
                "weights",
                vector_module(w=w),
                _train,
                ("penalties",),
                batches=(tuple(train),),
                initial=vector_module(w=torch.zeros(columns, dtype=torch.float64)),
                # Half of what is stable, since the penalties may grow.
                learning_rate=0.5 / largest,
                steps=20,
                scale=1 / largest,
            ),
            Stage(
                "penalties",
                vector_module(log=log),
                _validate,
                ("weights",),
                batches=(tuple(held_out),),
                learning_rate=0.02,
                optimizer="adam",
            ),
        ),
        exact,
    )


FAMILY = Family(
    "ridge", "ridge regression with one penalty per coordinate, in closed form", ("50", "breast-cancer", "200"), build
)
