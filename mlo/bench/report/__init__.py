"""Tables and plots from records, the same ones each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlo.bench.records import Record
from mlo.bench.report.tables import tables

TABLES = "tables.md"


def write_report(records: Sequence[Record], folder: Path, *, plots: bool = True) -> list[Path]:
    """Write the tables, and the plots where there is something to plot, and return the files.

    Raises:
        ConfigurationError: matplotlib is missing.

    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TABLES
    path.write_text(tables(records), encoding="utf-8")
    if not plots:
        return [path]
    from mlo.bench.report.plots import write_plots  # noqa: PLC0415 - needs an extra

    return [path, *write_plots(records, folder)]
