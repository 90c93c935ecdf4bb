"""Drawings of cells."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from examples.nas_interleaving.drawings.names import OPERATION_COLOURS, state_names
from examples.nas_interleaving.genotype import CELL_KINDS, Cell, Genotype

Point = tuple[float, float]

#: Heights of the nodes: those after each other are far apart, so that edges pass beside the nodes between.
_HEIGHTS = (1.5, -1.5, 0.5, -0.5)
#: How far an edge bends, as a share of its length.
_BEND = 0.18
#: Where on an edge its name may stand; the first free one is taken.
_ALONG = (0.5, 0.4, 0.6, 0.3, 0.7, 0.22)
#: Size of a name in the units of the drawing.
_NAME = (0.8, 0.26)


def draw_cells(genotype: Genotype) -> Figure:
    """Return a drawing of the normal and the reduction cell."""
    figure = Figure(figsize=(2.6 * genotype.nodes + 3, 9), dpi=120, layout="constrained")
    for axes, kind in zip(figure.subplots(2, 1), CELL_KINDS, strict=True):
        _draw_cell(axes, getattr(genotype, kind))
        axes.set_title(f"{kind} cell")
    return figure


def _draw_cell(axes: Axes, cell: Cell) -> None:
    centres = [(0.0, 0.9), (0.0, -0.9)] + [(2.0 + 2.0 * i, _HEIGHTS[i % len(_HEIGHTS)]) for i in range(len(cell))]
    names = state_names(len(cell))
    output = (2.0 * len(cell) + 2.0, 0.0)
    taken, middles = [*centres, output], list(centres)
    for node, edges in enumerate(cell):
        for slot, (operation, state) in enumerate(edges):
            ends = centres[state], centres[node + 2]
            bend = _BEND if slot == 0 else -_BEND  # apart, so that neither edge of a node hides the other or its name
            taken.append(_draw_edge(axes, *ends, operation, bend, taken))
            middles.append(_on_curve(*ends, bend, 0.5))
    for centre in centres[2:]:
        axes.add_patch(FancyArrowPatch(centre, output, shrinkA=16, shrinkB=16, color="0.8", linewidth=1, zorder=0))
    for centre, name in zip([*centres, output], [*names, "$c_k$"], strict=True):
        colour = "#d8e6f3" if name.isdecimal() else "#e8f0d8"
        axes.text(
            centre[0],
            centre[1],
            name,
            ha="center",
            va="center",
            fontsize=12,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "0.3"},
            zorder=4,
        )
    axes.set_xlim(-0.8, output[0] + 0.8)
    heights = [y for _, y in middles]
    axes.set_ylim(min(heights) - 0.5, max(heights) + 0.5)
    axes.axis("off")


def _draw_edge(axes: Axes, start: Point, end: Point, operation: str, bend: float, taken: Sequence[Point]) -> Point:
    """Draw an edge, and return where its name stands: at none of the places that are taken, if it can."""
    colour = OPERATION_COLOURS[operation]
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=14,
            shrinkA=18,
            shrinkB=18,
            color=colour,
            linewidth=1.8,
        )
    )
    places = [_on_curve(start, end, bend, t) for t in _ALONG]
    place = max(places, key=lambda p: min([1.0, *(_apart(p, other) for other in taken)]))
    axes.text(
        place[0],
        place[1],
        operation,
        ha="center",
        va="center",
        fontsize=8,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
        zorder=5,
    )
    return place


def _on_curve(start: Point, end: Point, bend: float, t: float) -> Point:
    """Return a point of the quadratic Bézier curve whose control point lies `bend` of the chord beside its middle."""
    run, rise = end[0] - start[0], end[1] - start[1]
    side = 2 * bend * t * (1 - t)
    return start[0] + t * run + side * rise, start[1] + t * rise - side * run


def _apart(a: Point, b: Point) -> float:
    """Return how far apart two names are, in the size of a name: those of 1 and more do not touch."""
    return max(abs(a[0] - b[0]) / _NAME[0], abs(a[1] - b[1]) / _NAME[1])
