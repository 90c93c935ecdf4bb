"""What operations, states and edges are called in figures, and in which colours they stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl

from examples.nas_interleaving.genotype import CELL_KINDS, edge_count
from examples.nas_interleaving.operations import OPERATION_NAMES

OPERATION_COLOURS = dict(zip(OPERATION_NAMES, mpl.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]


def nodes_of(lines: Sequence[dict[str, Any]]) -> int:
    """Return how many intermediate nodes the cells have whose weights these are."""
    edges = len(lines[0][CELL_KINDS[0]])
    return next(n for n in range(1, edges + 1) if edge_count(n) == edges)


def state_names(nodes: int) -> list[str]:
    """Return the names of what a cell's nodes read: the two inputs and the nodes."""
    return ["$c_{k-2}$", "$c_{k-1}$", *map(str, range(nodes))]


def edge_names(nodes: int) -> list[str]:
    """Return the names of all edges, in the order of the weights' rows."""
    states = state_names(nodes)
    return [f"{states[state]} → {node}" for node in range(nodes) for state in range(2 + node)]


def by_problem(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of each problem."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["problem"], []).append(line)
    return found
