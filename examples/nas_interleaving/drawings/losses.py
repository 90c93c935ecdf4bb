"""Losses over the steps of a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.nas_interleaving.drawings.names import by_problem
from examples.nas_interleaving.stages import ARCHITECTURE


def draw_losses(lines: Sequence[dict[str, Any]], titles: Mapping[str, str], columns: int) -> Figure:
    """Return the losses of all stages over the steps, a row for each round and a column for each learner.

    Args:
        lines: the metrics.
        titles: of the stages, in their order.
        columns: how many stand beside each other.

    """
    found = by_problem(lines)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(4.2 * columns + 1, 2.6 * (rows + 1)), dpi=110, layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns)
    for position, (stage, title) in enumerate(titles.items()):
        axes = figure.add_subplot(grid[position // columns, position % columns])
        own = found.get(stage, [])
        _draw_series(axes, own, "training", lambda line: line["metrics"].get("fit", line["loss"]))
        _draw_series(axes, own, "validation", lambda line: (line["validation"] or {}).get("loss"))
        axes.set_title(title, fontsize=10)
    axes = figure.add_subplot(grid[rows, :])
    upper = found.get(ARCHITECTURE, [])
    _draw_series(axes, upper, "sum", lambda line: line["loss"])
    for name in dict.fromkeys(name for line in upper for name in line["metrics"]):
        _draw_series(axes, upper, titles.get(name, name), partial(_metric, name))
    axes.set_title("architecture: its loss on validation batches", fontsize=10)
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.set_ylabel("cross-entropy")
        if axes.lines:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def _metric(name: str, line: Mapping[str, Any]) -> float | None:
    return line["metrics"].get(name)


def _draw_series(
    axes: Axes, lines: Sequence[dict[str, Any]], label: str, value: Callable[[dict[str, Any]], float | None]
) -> None:
    points = [(line["step"], value(line)) for line in lines]
    points = [(step, v) for step, v in points if v is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
