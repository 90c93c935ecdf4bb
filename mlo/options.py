"""What counts as a valid option of a method."""

from __future__ import annotations

import math
import numbers


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number, one of NumPy's included (`bool` is none)."""
    return _is(numbers.Real, value) and math.isfinite(value)  # type: ignore[arg-type]


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 1 (`bool` is none)."""
    return _is(numbers.Integral, value) and value >= 1  # type: ignore[operator]


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
