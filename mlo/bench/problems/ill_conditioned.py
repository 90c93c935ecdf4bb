"""A quadratic stage with a condition number that is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlo.bench.problems.family import Family, Request, vector_module
from mlo.bench.stage import Case, Stage, View

_WEIGHTS = 100


def _train(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    """½ wᵀAw − w·x."""
    w, matrix = own.params["w"], batch
    loss: Tensor = 0.5 * w @ matrix @ w - w @ others["upper"].params["x"]
    return loss


def _validate(_: View, others: Mapping[str, View], batch: Any) -> Tensor:
    """½ (w − t)ᵀA(w − t): the cotangent is A(w − t), and the hypergradient w − t."""
    matrix, target = batch
    away = others["stage"].params["w"] - target
    loss: Tensor = 0.5 * away @ matrix @ away
    return loss


def build(request: Request) -> Case:
    """Return the case: eigenvalues evenly on a logarithmic scale from 1/condition to 1.

    With w* = A⁻¹x and F = ½ (w − t)ᵀA(w − t), dF/dx = A⁻¹A(w − t) = w − t, an arbitrary vector with entries of about 1:
    a residual r of the solve may become an error of condition·r.
    """
    generator = torch.Generator().manual_seed(request.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rotation = torch.linalg.qr(normal(_WEIGHTS, _WEIGHTS)).Q
    eigenvalues = float(request.size) ** -torch.linspace(0, 1, _WEIGHTS, dtype=torch.float64)
    matrix = rotation @ torch.diag(eigenvalues) @ rotation.T
    matrix = (matrix + matrix.T) / 2
    solution, target = normal(_WEIGHTS), normal(_WEIGHTS)
    stage = Stage(
        "stage",
        vector_module(w=solution),
        _train,
        ("upper",),
        batches=(matrix,),
        initial=vector_module(w=torch.zeros_like(solution)),
        learning_rate=1.0,
        steps=10,
        scale=1.0,
    )
    upper = Stage(
        "upper",
        vector_module(x=matrix @ solution),
        _validate,
        ("stage",),
        batches=((matrix, target),),
        learning_rate=0.05,
        optimizer="adam",
    )
    return Case("ill-conditioned", request.size, (stage, upper), lambda: {"x": solution - target})


FAMILY = Family(
    "ill-conditioned", "a quadratic stage of that condition number, 100 weights", ("1e2", "1e4", "1e6"), build
)
