"""Arithmetic on vectors that are kept as sequences of tensors, one per parameter.

A stage's parameters are never flattened into one tensor: that would cost a copy, and would mix devices
and dtypes. Scalars come back as Python floats, summed in double precision over the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Vector = tuple[Tensor, ...]

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return Σ aᵢ·bᵢ over all entries of all tensors."""
    return math.fsum(_numbers([_dot(x, y) for x, y in zip(a, b, strict=True)]))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype in _LOW_PRECISION:
        x, y = x.float(), y.float()
    return torch.dot(x.reshape(-1), y.reshape(-1))


def norm(a: Sequence[Tensor]) -> float:
    """Return the Euclidean norm over all entries of all tensors.

    The norms of the tensors are combined by `math.hypot`, which neither overflows nor underflows.
    """
    return math.hypot(*_numbers([_norm(x) for x in a]))


def _norm(x: Tensor) -> Tensor:
    if x.is_sparse:
        x = x.coalesce().values()
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32 if x.dtype in _LOW_PRECISION else None)
    return norm


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Return 0-dim tensors as Python floats, with one transfer from a device instead of one each."""
    if len({s.device for s in scalars}) > 1:
        return [s.item() for s in scalars]
    return torch.stack(tuple(scalars)).tolist() if scalars else []


def zeros_like(a: Sequence[Tensor]) -> Vector:
    """Return a zero vector of the same shapes, dtypes and devices."""
    return tuple(torch.zeros_like(x) for x in a)


def scale(a: Sequence[Tensor], factors: float | Sequence[float]) -> Vector:
    """Return `factors`·a with one factor for all tensors, or one for each."""
    if not isinstance(factors, float | int):
        return tuple(x * f for x, f in zip(a, factors, strict=True))
    return tuple(x * factors for x in a)


def add(a: Sequence[Tensor], b: Sequence[Tensor], factor: float = 1.0) -> Vector:
    """Return a + `factor`·b."""
    return tuple(x.add(y, alpha=factor) for x, y in zip(a, b, strict=True))


def subtract(a: Sequence[Tensor], b: Sequence[Tensor]) -> Vector:
    """Return a − b."""
    return tuple(x - y for x, y in zip(a, b, strict=True))


def rounding_unit(a: Sequence[Tensor]) -> float:
    """Return the machine epsilon of the coarsest dtype among the tensors."""
    return max(torch.finfo(x.dtype).eps for x in a)
