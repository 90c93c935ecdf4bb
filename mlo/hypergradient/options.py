"""What counts as a valid option of a method."""

from __future__ import annotations

import math


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number (`bool` is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 1 (`bool` is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
