"""Heat maps of the architecture's weights: at some steps in one figure, and over all of them as an animation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from examples.nas_interleaving.drawings.names import edge_names, nodes_of
from examples.nas_interleaving.genotype import CELL_KINDS, Genotype
from examples.nas_interleaving.operations import OPERATION_NAMES

_SNAPSHOTS = 4
_FRAMES = 20
_FRAMES_PER_SECOND = 4

Line = Mapping[str, Any]


def draw_heat_maps(lines: Sequence[Line]) -> Figure:
    """Return heat maps at some steps from first to last, edges × operations; what would be decoded has a red ring."""
    chosen = _spread(lines, _SNAPSHOTS)
    height = 0.2 * len(lines[0][CELL_KINDS[0]]) + 0.5
    figure = Figure(figsize=(2.3 * len(chosen) + 1.6, 2 * height + 1.4), dpi=110, layout="constrained")
    grid = figure.subplots(2, len(chosen), squeeze=False, sharex=True, sharey=True)
    top = _top(lines)
    for row, (panels, kind) in enumerate(zip(grid, CELL_KINDS, strict=True)):
        for axes, line in zip(panels, chosen, strict=True):
            image = _HeatMap(axes, lines, kind, top)
            image.show(line)
            axes.set_title(f"{kind}, step {line['step']}", fontsize=9)
            if row == 0:
                axes.tick_params(labelbottom=False)
    figure.colorbar(image.image, ax=grid, shrink=0.5, label="weight")
    return figure


def animate_heat_maps(lines: Sequence[Line]) -> bytes:
    """Return an animated GIF of both cells' heat maps over the steps."""
    chosen = _spread(lines, _FRAMES)
    height = 0.24 * len(lines[0][CELL_KINDS[0]]) + 1.6
    figure = Figure(figsize=(8.0, height), dpi=75, layout="constrained")
    FigureCanvasAgg(figure)
    panels, top = figure.subplots(1, 2), _top(lines)
    maps = [_HeatMap(axes, lines, kind, top) for axes, kind in zip(panels, CELL_KINDS, strict=True)]
    for axes, kind in zip(panels, CELL_KINDS, strict=True):
        axes.set_title(f"{kind} cell", fontsize=10)
    figure.colorbar(maps[0].image, ax=panels, label="weight")
    title = figure.suptitle(f"step {chosen[0]['step']}")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # once is enough: it takes longer than all else

    def update(line: Line) -> list[Any]:
        title.set_text(f"step {line['step']}")
        for each in maps:
            each.show(line)
        return []

    with TemporaryDirectory() as place:
        file = Path(place) / "weights.gif"
        writer = PillowWriter(fps=_FRAMES_PER_SECOND)
        FuncAnimation(figure, update, frames=[*chosen, *[chosen[-1]] * _FRAMES_PER_SECOND]).save(file, writer=writer)
        return file.read_bytes()


class _HeatMap:
    """One cell's heat map in one panel."""

    def __init__(self, axes: Axes, lines: Sequence[Line], kind: str, top: float) -> None:
        self._kind = kind
        names = edge_names(nodes_of(lines))  # type: ignore[arg-type]
        empty = torch.zeros(len(names), len(OPERATION_NAMES)).numpy()
        self.image: AxesImage = axes.imshow(empty, vmin=0, vmax=top, cmap="Blues", aspect="auto")
        self._rings: PathCollection = axes.scatter([], [], s=22, facecolors="none", edgecolors="red", linewidths=1.2)
        axes.set_xticks(range(len(OPERATION_NAMES)), OPERATION_NAMES, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)

    def show(self, line: Line) -> None:
        """Show the weights of a step."""
        self.image.set_data(line[self._kind])
        genotype = Genotype.decode({kind: torch.tensor(line[kind]) for kind in CELL_KINDS})
        first, rings = 0, []
        for node, edges in enumerate(getattr(genotype, self._kind)):
            rings += [(OPERATION_NAMES.index(name), first + state) for name, state in edges]
            first += 2 + node
        self._rings.set_offsets(rings)


def _top(lines: Sequence[Line]) -> float:
    return max(w for line in lines for kind in CELL_KINDS for row in line[kind] for w in row)


def _spread(lines: Sequence[Line], number: int) -> list[Line]:
    """Return at most so many lines from the first to the last, evenly spread."""
    number = min(number, len(lines))
    if number < 2:
        return [lines[-1]]
    return [lines[round(i * (len(lines) - 1) / (number - 1))] for i in range(number)]
