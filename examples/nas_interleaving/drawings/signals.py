"""What tells how a search fares: how far encoders drift from each other, and signs of collapse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.nas_interleaving.drawings.names import by_problem
from examples.nas_interleaving.stages import ARCHITECTURE

Points = list[tuple[int, float]]

_SIGNS = {
    "skip_connections": "skip connections in the normal cell",
    "eigenvalue": "largest eigenvalue of the validation Hessian",
}


def draw_signals(lines: Sequence[dict[str, Any]], titles: Mapping[str, str]) -> Figure | None:
    """Return the drift ‖W − W_prev‖ of the encoders and the signs of collapse over the steps; `None` without any.

    Args:
        lines: the metrics.
        titles: of the stages.

    """
    found = by_problem(lines)
    drift = {title: _drift(found.get(stage, [])) for stage, title in titles.items()}
    drift = {title: points for title, points in drift.items() if points}
    signs = {label: _validated(found.get(ARCHITECTURE, []), key) for key, label in _SIGNS.items()}
    signs = {label: points for label, points in signs.items() if points}
    panels = len(signs) + bool(drift)
    if not panels:
        return None
    figure = Figure(figsize=(4.6 * panels, 3.2), dpi=110, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if drift:
        _draw_drift(axes.pop(0), drift)
    for each, (label, points) in zip(axes, signs.items(), strict=True):
        each.plot(*zip(*points, strict=True), marker=".", color="0.25")
        each.set_title(label, fontsize=10)
        if label == _SIGNS["skip_connections"]:
            each.set_ylim(-0.2, max(8.0, *(v for _, v in points)) + 0.2)
            each.yaxis.set_major_locator(MaxNLocator(integer=True))
    for each in figure.axes:
        each.set_xlabel("step")
        each.grid(alpha=0.3)
    return figure


def _draw_drift(axes: Axes, drift: Mapping[str, Points]) -> None:
    for title, points in drift.items():
        axes.plot(*zip(*points, strict=True), label=title, linewidth=1.4)
    axes.set_title("drift of the encoders, $\\|W - W_{prev}\\|$", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _drift(lines: Sequence[dict[str, Any]]) -> Points:
    key = "squared_distance"
    return [(line["step"], line["metrics"][key] ** 0.5) for line in lines if key in line["metrics"]]


def _validated(lines: Sequence[dict[str, Any]], key: str) -> Points:
    return [(line["step"], line["validation"][key]) for line in lines if key in (line["validation"] or {})]
