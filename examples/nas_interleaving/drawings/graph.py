"""A drawing of the problem graph, from its Mermaid text."""

from __future__ import annotations

import re
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

_NODE = re.compile(r'^\s*(\w+)\["(.+)"\]$')
_EDGE = re.compile(r"^\s*(\w+) (?:-->|-\.->)\|(\w+)\| (\w+)$")
_STYLES = {"response": ("-", "0.2"), "constraint": (":", "tab:blue"), "constant": (":", "0.6")}


def draw_graph(mermaid: str, labels: Mapping[str, str]) -> Figure:
    """Return a drawing of the graph: stages from left to right in the order of solving them, the root above.

    Args:
        mermaid: what `ProblemGraph.to_mermaid` returns.
        labels: for problems that are to be called by something else than their names.

    """
    lines = mermaid.splitlines()
    names = {m[1]: m[2] for m in map(_NODE.match, lines) if m}
    edges = [(m[1], m[2], m[3]) for m in map(_EDGE.match, lines) if m]
    *stages, root = names
    places = {stage: (2.6 * i, 0.0) for i, stage in enumerate(stages)}
    places[root] = (1.3 * (len(stages) - 1), 2.6)
    figure = Figure(figsize=(max(4.5, 1.7 * len(stages)), 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for start, kind, end in edges:
        style, colour = _STYLES[kind]
        straight = places[start][1] == places[end][1]
        axes.add_patch(
            FancyArrowPatch(
                places[start],
                places[end],
                # Two arrows between the same problems have opposite directions, and so bend apart.
                connectionstyle="arc3,rad=0" if straight else "arc3,rad=0.13",
                arrowstyle="-|>",
                mutation_scale=12,
                shrinkA=26,
                shrinkB=26,
                linestyle=style,
                color=colour,
            )
        )
    for node, (x, y) in places.items():
        text = labels.get(names[node], names[node]).replace(", ", "\n")
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#e8f0d8" if node == root else "#d8e6f3", "edgecolor": "0.3"}
        axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box, zorder=4)
    for kind in dict.fromkeys(kind for _, kind, _ in edges):
        axes.plot([], [], linestyle=_STYLES[kind][0], color=_STYLES[kind][1], label=kind)
    axes.legend(loc="upper left", fontsize=8)
    axes.set_xlim(-1.3, 2.6 * (len(stages) - 1) + 1.3)
    axes.set_ylim(-0.8, 3.3)
    axes.axis("off")
    return figure
