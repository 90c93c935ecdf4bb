"""The architecture's weights over the steps of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.nas_interleaving.drawings.names import OPERATION_COLOURS, edge_names, nodes_of, state_names
from examples.nas_interleaving.genotype import CELL_KINDS
from examples.nas_interleaving.operations import OPERATION_NAMES


def draw_weights(lines: Sequence[dict[str, Any]]) -> Figure:
    """Return the architecture weights over the steps, one panel for each edge of each cell."""
    steps = [line["step"] for line in lines]
    nodes = nodes_of(lines)
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
                    axes.plot(steps, values, color=OPERATION_COLOURS[operation], linewidth=1.2, label=operation)
                axes.set_title(f"{state_names(nodes)[state]} → {node}", fontsize=8)
                axes.tick_params(labelsize=6, labelleft=state == 0)
                panels.append(axes)
                row += 1
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(OPERATION_NAMES) // 2, title="weight over steps of")
    return figure


def draw_edges(lines: Sequence[dict[str, Any]]) -> Figure:
    """Return the weight of each edge over the steps, a panel for each node: the softmax of β over the edges into it.

    For searches with edge normalisation (PC-DARTS); in others all edges weigh 1.
    """
    steps = [line["step"] for line in lines]
    nodes = nodes_of(lines)
    figure = Figure(figsize=(3.0 * nodes + 0.6, 5.4), dpi=110, layout="constrained")
    rows = figure.subplots(2, nodes, sharex=True, sharey="col", squeeze=False)
    names = edge_names(nodes)
    for panels, kind in zip(rows, CELL_KINDS, strict=True):
        first = 0
        for node, axes in enumerate(panels):
            for edge in range(first, first + 2 + node):
                values = [sum(line[kind][edge]) for line in lines]
                axes.plot(steps, values, linewidth=1.4, label=names[edge])
            first += 2 + node
            axes.set_title(f"{kind} cell, node {node}", fontsize=9)
            axes.legend(fontsize=7)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("weight of the edge")
    for axes in rows[-1]:
        axes.set_xlabel("step")
    return figure


def has_edge_weights(lines: Sequence[dict[str, Any]]) -> bool:
    """Return whether edges have weights of their own."""
    return any(abs(sum(row) - 1) > 1e-3 for row in lines[-1][CELL_KINDS[0]])
