"""Arithmetic on vectors that are kept as sequences of tensors, one per parameter.

A stage's parameters are never flattened into one tensor: that would cost a copy, and would mix devices
and dtypes. The operations are torch's own over lists of tensors, as its optimizers use them. Scalars come back
as Python floats, summed in double precision over the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Vector = tuple[Tensor, ...]

_LOW_PRECISION = (torch.float16, torch.bfloat16)
# In a shorter vector entries may matter whose squares are below the full range of float32 (1e-38), in a longer one only
# by the millions.
_SQUARES_IN_RANGE = 1e-15
#: The same where all is in float64, whose range ends at 1e-308.
SMALLEST_LENGTH = 1e-140
#: Lengths of vectors whose squares are safe in every dtype that a solver works in.
SAFE_LENGTHS = (1e-8, 1e8)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return Σ aᵢ·bᵢ over all entries of all tensors."""
    if len(a) == 1:
        return _dot(a[0], b[0]).item()
    return math.fsum(_numbers([_dot(x, y) for x, y in zip(a, b, strict=True)]))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype in _LOW_PRECISION:
        x, y = x.float(), y.float()
    return torch.dot(x.reshape(-1), y.reshape(-1))


def norm(a: Sequence[Tensor]) -> float:
    """Return the Euclidean norm over all entries of all tensors.

    It neither overflows nor underflows where the entries do not.
    """
    if not a:
        return 0.0
    found = _norm(a)
    if _SQUARES_IN_RANGE < found < math.inf:
        return found
    if SMALLEST_LENGTH < found < math.inf and all(x.dtype is torch.float64 for x in a):
        return found
    # Squares, or some of them, may have left the range of the dtype: once more with the largest entry at 1.
    largest = max(_numbers([x.abs().max() if x.numel() else x.new_zeros(()) for x in a]))
    if not 0.0 < largest < math.inf:
        return found
    return _norm(scale(a, 1 / largest)) * largest


def _norm(a: Sequence[Tensor]) -> float:
    for x in a:
        if x.is_sparse or x.dtype in _LOW_PRECISION:
            a = [(x.coalesce().values() if x.is_sparse else x).float() for x in a]
            break
    return math.hypot(*_numbers(torch._foreach_norm(tuple(a))))


def _numbers(scalars: Sequence[Tensor]) -> Iterable[float]:
    """Return 0-dim tensors as Python floats, with one transfer from a device instead of one each."""
    if scalars and not scalars[0].is_cpu and len({s.device for s in scalars}) == 1:
        return torch.stack(tuple(scalars)).tolist()
    return map(Tensor.item, scalars)


def zeros_like(a: Sequence[Tensor]) -> Vector:
    """Return a zero vector of the same shapes, dtypes and devices."""
    return tuple(torch.zeros_like(x) for x in a)


def scale(a: Sequence[Tensor], factors: float | Sequence[float]) -> Vector:
    """Return `factors`·a with one factor for all tensors, or one for each."""
    given = factors if isinstance(factors, float | int) else list(factors)
    return tuple(torch._foreach_mul(list(a), given))


def add(a: Sequence[Tensor], b: Sequence[Tensor], factor: float = 1.0) -> Vector:
    """Return a + `factor`·b."""
    return tuple(torch._foreach_add(list(a), list(b), alpha=factor))


def add_(a: Vector, b: Vector, factor: float = 1.0) -> Vector:
    """Add `factor`·b to a in place, and return a."""
    torch._foreach_add_(a, b, alpha=factor)
    return a


def scale_and_add_(a: Vector, factor: float, b: Sequence[Tensor]) -> Vector:
    """Replace a by `factor`·a + b in place, and return it."""
    if a[0].is_cpu:
        for x, y in zip(a, b, strict=True):  # goes through the memory once
            torch.add(y, x, alpha=factor, out=x)
    else:
        torch._foreach_mul_(a, factor)
        torch._foreach_add_(a, list(b))
    return a


def subtract(a: Sequence[Tensor], b: Sequence[Tensor]) -> Vector:
    """Return a − b."""
    return tuple(torch._foreach_sub(list(a), list(b)))


def reflect_(a: Sequence[Tensor], centre: Sequence[Tensor]) -> None:
    """Replace c + d by c − d in its place, c the `centre`: allocating memory anew takes several times as long.

    Past autograd, and past the count of writes.
    """
    with torch.set_grad_enabled(False):
        torch._foreach_lerp_([t.data for t in a], tuple(centre), 2.0)


def differences(
    ahead: Sequence[Tensor | None], behind: Sequence[Tensor | None], factor: float
) -> tuple[Tensor | None, ...]:
    """Return (ahead − behind)·factor, where one that is missing counts as zero and both missing as `None`."""
    there: list[Tensor] = []
    back: list[Tensor] = []
    for a, b in zip(ahead, behind, strict=True):
        if a is None or b is None:
            return tuple([_difference(a, b, factor) for a, b in zip(ahead, behind, strict=True)])
        there.append(a)
        back.append(b)
    changes = subtract(there, back)
    if any(t.dtype in _LOW_PRECISION for t in changes):
        return scale(changes, factor)  # in place torch rounds the factor to their 16 bits
    torch._foreach_mul_(changes, factor)
    return changes


def _difference(a: Tensor | None, b: Tensor | None, factor: float) -> Tensor | None:
    if a is None:
        return None if b is None else b * -factor
    return (a if b is None else a - b) * factor


def scaled(tensors: Sequence[Tensor | None], factor: float) -> tuple[Tensor | None, ...]:
    """Return a multiple of vectors some of which are missing."""
    live = [t for t in tensors if t is not None]
    found = iter(scale(live, factor) if live else ())
    return tuple([None if t is None else next(found) for t in tensors])


def rounding_unit(a: Sequence[Tensor]) -> float:
    """Return the machine epsilon of the coarsest dtype among the tensors."""
    return max(torch.finfo(dtype).eps for dtype in {x.dtype for x in a})
