"""Progress bars."""

from __future__ import annotations

import sys

from tqdm import tqdm

_SECONDS_BETWEEN_LOG_LINES = 10.0


def progress(total: int, title: str) -> tqdm:
    """Return a bar over `total` steps: live on a terminal, a line now and then in a log file."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=title,
        unit="step",
        mininterval=0.1 if live else _SECONDS_BETWEEN_LOG_LINES,
        dynamic_ncols=live,
    )
