"""Temporary: moved to mlo.options."""

from mlo.options import is_count, is_number

__all__ = ["is_count", "is_number"]
