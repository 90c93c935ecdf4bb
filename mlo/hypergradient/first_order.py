"""Results that must not be differentiated again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlo.errors import ConfigurationError
from mlo.hypergradient.base import HypergradientMethod
from mlo.stage_function import StageFunction
from mlo.vectors import Vector


def first_order_only(
    method: HypergradientMethod, stage: StageFunction, result: Sequence[Tensor | None], origins: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return `result` as functions of `origins` whose derivative is an error instead of silently zero."""
    if not torch.is_grad_enabled():
        return tuple(result)
    live = [r for r in result if r is not None]
    guarded = iter(_FirstOrderOnly.apply(type(method).__name__, stage.name, len(live), *live, *origins))  # type: ignore[no-untyped-call]
    return tuple(None if r is None else next(guarded) for r in result)


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, method: str, stage: str, count: int, *tensors: Tensor) -> Vector:
        ctx.method, ctx.stage = method, stage
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise ConfigurationError(
            f"{ctx.method} at stage {ctx.stage!r} is differentiated again, which it cannot be with the products that "
            "it uses. Use ConjugateGradient, Neumann or Identity with mlo.DoubleBackward() at this stage."
        )
