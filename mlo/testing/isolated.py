"""A function of tensors as one autograd node that binds its arguments anew in every backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from mlo.vectors import Vector

#: Binds tensors for a span and hands out the loss as a function without arguments.
Span = Callable[[Vector], AbstractContextManager[Callable[[], Tensor]]]
#: From the loss, the tensors (those bound and further ones), and whether its result has to be differentiable.
Body = Callable[[Callable[[], Tensor], Vector, bool], Vector]


def isolated(span: Span, bound: int, body: Body, *tensors: Tensor) -> Vector:
    """Return `body` of the loss at `tensors`, differentiable any number of times.

    The first `bound` tensors are bound by `span`. A backward pass through a loss must run while its tensors are bound,
    since activation checkpointing evaluates it again. So the body and each of its derivatives run in a span of
    their own, on fresh leaves.
    """
    return _Isolated.apply(span, bound, body, *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _Isolated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, span: Span, bound: int, body: Body, *tensors: Tensor) -> Vector:
        ctx.arguments = span, bound, body
        ctx.save_for_backward(*tensors)
        leaves = tuple(t.detach().requires_grad_() for t in tensors)
        with torch.enable_grad(), span(leaves[:bound]) as evaluate:
            return tuple(t.detach() for t in body(evaluate, leaves, False))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        span, bound, body = ctx.arguments
        count = len(ctx.saved_tensors)

        def pulled_back(evaluate: Callable[[], Tensor], tensors: Vector, create_graph: bool) -> Vector:
            given = tensors[:count]
            return partial_derivatives(body(evaluate, given, True), given, tensors[count:], create_graph=create_graph)

        return None, None, None, *isolated(span, bound, pulled_back, *ctx.saved_tensors, *cotangents)


def partial_derivatives(
    outputs: Sequence[Tensor], at: Sequence[Tensor], cotangents: Sequence[Tensor], *, create_graph: bool
) -> Vector:
    """Return Σ ∂outputsᵢ/∂at · cotangentsᵢ, with zeros where there is no dependence."""
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not live:
        return tuple(torch.zeros_like(t) for t in at)
    found = torch.autograd.grad(
        [o for o, _ in live], at, [c for _, c in live], create_graph=create_graph, allow_unused=True
    )
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(found, at, strict=True))
