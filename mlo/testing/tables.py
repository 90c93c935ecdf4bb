"""Plain-text tables for reports."""

from __future__ import annotations

from collections.abc import Sequence

#: Errors below this are shown as such, so that a table does not change with the rounding of a machine.
SMALL = 1e-9


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with columns of equal width."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def shown(error: float | None) -> str:
    """Return a relative error for a table."""
    if error is None:
        return "–"
    return f"< {SMALL:.0e}" if error < SMALL else f"{error:.1e}"
