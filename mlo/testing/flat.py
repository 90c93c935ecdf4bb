"""Tensors of several shapes as one vector, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlo.vectors import Vector


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return all entries in one vector, on the device of the first tensor."""
    return torch.cat([t.reshape(-1).to(tensors[0].device) for t in tensors])


def separated(flat: Tensor, like: Sequence[Tensor]) -> Vector:
    """Return the parts of `flat` in the shapes and on the devices of `like`; a view where that is possible."""
    parts = torch.split(flat, [t.numel() for t in like])
    return tuple(p.reshape(t.shape).to(t.device) for p, t in zip(parts, like, strict=True))


def separated_by_shape(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> Vector:
    """Return the parts of `flat` in the given shapes."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return tuple(p.reshape(shape) for p, shape in zip(parts, shapes, strict=True))


def unit_vector(size: int, generator: torch.Generator) -> Tensor:
    """Return a random vector of length 1 in float64; `generator` is on the CPU."""
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    return v.div(torch.linalg.vector_norm(v))
