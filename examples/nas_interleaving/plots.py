"""Drawings of a run, made from its folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from examples.nas_interleaving.genotype import CELL_KINDS, Cell, Genotype, edge_count
from examples.nas_interleaving.interleaving import stage_names
from examples.nas_interleaving.operations import OPERATION_NAMES
from examples.nas_interleaving.run_folder import METRICS, WEIGHTS, RunFolder
from examples.nas_interleaving.stages import ARCHITECTURE

CELLS_PNG = "cells.png"
LOSSES_PNG = "losses.png"
WEIGHTS_PNG = "architecture.png"

_COLOURS = dict(zip(OPERATION_NAMES, mpl.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]


def draw_run(folder: RunFolder) -> None:
    """Draw the cells, the losses and the architecture weights of the search in a folder."""
    settings = folder.read_search_settings()
    _save(folder, CELLS_PNG, draw_cells(folder.read_genotype()))
    _save(folder, WEIGHTS_PNG, draw_weights(list(folder.read_lines(WEIGHTS))))
    if folder.has(METRICS):  # not before the first step
        _save(folder, LOSSES_PNG, draw_losses(list(folder.read_lines(METRICS)), settings.tasks, settings.rounds))


def _save(folder: RunFolder, name: str, figure: Figure) -> None:
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    folder.write_bytes(name, drawn.getvalue())


def draw_cells(genotype: Genotype) -> Figure:
    """Return a drawing of the normal and the reduction cell."""
    figure = Figure(figsize=(2.6 * genotype.nodes + 3, 9), dpi=120, layout="constrained")
    for axes, kind in zip(figure.subplots(2, 1), CELL_KINDS, strict=True):
        _draw_cell(axes, getattr(genotype, kind))
        axes.set_title(f"{kind} cell")
    return figure


def _draw_cell(axes: Axes, cell: Cell) -> None:
    centres = [(0.0, 0.9), (0.0, -0.9)] + [(2.0 + 2.0 * i, 0.9 * (-1) ** i) for i in range(len(cell))]
    names = ["c_{k-2}", "c_{k-1}", *map(str, range(len(cell)))]
    output = (2.0 * len(cell) + 2.0, 0.0)
    for node, edges in enumerate(cell):
        for slot, (operation, state) in enumerate(edges):
            _draw_edge(axes, centres[state], centres[node + 2], operation, slot)
    for centre in centres[2:]:
        axes.add_patch(FancyArrowPatch(centre, output, shrinkA=16, shrinkB=16, color="0.8", linewidth=1, zorder=0))
    for centre, name in zip([*centres, output], [*names, "c_k"], strict=True):
        colour = "#e8f0d8" if name.startswith("c_") else "#d8e6f3"
        axes.text(
            centre[0],
            centre[1],
            f"${name}$",
            ha="center",
            va="center",
            fontsize=12,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "0.3"},
            zorder=4,
        )
    axes.set_xlim(-0.8, output[0] + 0.8)
    axes.set_ylim(-1.9, 1.9)
    axes.axis("off")


def _draw_edge(axes: Axes, start: tuple[float, float], end: tuple[float, float], operation: str, slot: int) -> None:
    # The two edges of a node bend apart, so that neither hides the other or its name.
    bend = 0.18 if slot == 0 else -0.18
    colour = _COLOURS[operation]
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
    # The middle of a quadratic Bézier curve whose control point lies `bend` of the chord beside it.
    run, rise = end[0] - start[0], end[1] - start[1]
    middle = (start[0] + run / 2 + bend * rise / 2, start[1] + rise / 2 - bend * run / 2)
    axes.text(
        middle[0],
        middle[1],
        operation,
        ha="center",
        va="center",
        fontsize=8,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
        zorder=3,
    )


def draw_losses(lines: Sequence[dict[str, Any]], tasks: Sequence[str], rounds: int) -> Figure:
    """Return the losses of all stages over the steps, a row for each round and a column for each learner."""
    columns, rows = len(tasks), rounds
    stages = stage_names(columns, rows)
    figure = Figure(figsize=(4.2 * columns + 1, 2.6 * (rows + 1)), dpi=110, layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns)
    for position, stage in enumerate(stages):
        axes = figure.add_subplot(grid[position // columns, position % columns])
        own = [line for line in lines if line["problem"] == stage]
        _draw_series(axes, own, "training", lambda line: line["metrics"].get("fit"))
        _draw_series(axes, own, "validation", lambda line: (line["validation"] or {}).get("loss"))
        axes.set_title(f"round {position // columns + 1}, {tasks[position % columns]}", fontsize=10)
    axes = figure.add_subplot(grid[rows, :])
    upper = [line for line in lines if line["problem"] == ARCHITECTURE]
    _draw_series(axes, upper, "sum", lambda line: line["loss"])
    for name, task in zip(stages[-columns:], tasks, strict=True):
        _draw_series(axes, upper, task, lambda line, name=name: line["metrics"].get(name))
    axes.set_title("architecture: validation losses of the last round", fontsize=10)
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.set_ylabel("cross-entropy")
        if axes.lines:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def _draw_series(axes: Axes, lines: Sequence[dict[str, Any]], label: str, value: Any) -> None:
    points = [(line["step"], value(line)) for line in lines]
    points = [(step, v) for step, v in points if v is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)


def draw_weights(lines: Sequence[dict[str, Any]]) -> Figure:
    """Return the architecture weights over the steps, one panel for each edge of each cell."""
    steps = [line["step"] for line in lines]
    nodes = next(n for n in range(1, 100) if edge_count(n) == len(lines[0][CELL_KINDS[0]]))
    figure = Figure(figsize=(4.0 * (nodes + 1) + 1, 1.8 * nodes + 1.6), dpi=110)
    # Fixed margins: a layout engine takes ten seconds over this many panels.
    foot, head = 1.05 / figure.get_figheight(), 1 - 0.7 / figure.get_figheight()
    panels: list[Axes] = []
    for half, kind in enumerate(CELL_KINDS):
        left, right = 0.02 + 0.49 * half, 0.49 + 0.49 * half
        grid = figure.add_gridspec(
            nodes, nodes + 1, left=left, right=right, bottom=foot, top=head, wspace=0.1, hspace=0.45
        )
        figure.text((left + right) / 2, 1 - 0.2 / figure.get_figheight(), f"{kind} cell", ha="center", va="top")
        row = 0
        for node in range(nodes):
            for state in range(node + 2):
                axes = figure.add_subplot(grid[node, state], sharey=panels[0] if panels else None)
                for column, operation in enumerate(OPERATION_NAMES):
                    values = [line[kind][row][column] for line in lines]
                    axes.plot(steps, values, color=_COLOURS[operation], linewidth=1.2, label=operation)
                axes.set_title(f"${('c_{k-2}', 'c_{k-1}', *range(nodes))[state]}$ → {node}", fontsize=8)
                axes.tick_params(labelsize=6, labelleft=state == 0)
                panels.append(axes)
                row += 1
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(OPERATION_NAMES) // 2, title="weight over steps of")
    return figure
