"""Drawings of a run, made from its folder alone."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure

from examples.nas_interleaving.drawings.cells import draw_cells
from examples.nas_interleaving.drawings.graph import draw_graph
from examples.nas_interleaving.drawings.heat_maps import animate_heat_maps, draw_heat_maps
from examples.nas_interleaving.drawings.losses import draw_losses
from examples.nas_interleaving.drawings.signals import draw_signals
from examples.nas_interleaving.drawings.weights import draw_edges, draw_weights, has_edge_weights
from examples.nas_interleaving.interleaving import stage_names
from examples.nas_interleaving.run_folder import METRICS, WEIGHTS, RunFolder
from examples.nas_interleaving.search_settings import JOINT, SearchSettings
from examples.nas_interleaving.stages import ARCHITECTURE

CELLS_PNG = "cells.png"
LOSSES_PNG = "losses.png"
WEIGHTS_PNG = "architecture.png"
HEAT_MAPS_PNG = "heat_maps.png"
EDGES_PNG = "edges.png"
SIGNALS_PNG = "signals.png"
GRAPH_PNG = "graph.png"
HEAT_MAPS_GIF = "architecture.gif"

GRAPH = "graph.mmd"


def draw_run(folder: RunFolder) -> None:
    """Draw what a search leaves in its folder: cells, losses, architecture weights, drift, signs of collapse."""
    _save(folder, CELLS_PNG, draw_cells(folder.read_genotype()))
    if folder.has(WEIGHTS):  # not of an architecture that was drawn at random
        weights = list(folder.read_lines(WEIGHTS))
        _save(folder, WEIGHTS_PNG, draw_weights(weights))
        _save(folder, HEAT_MAPS_PNG, draw_heat_maps(weights))
        if has_edge_weights(weights):
            _save(folder, EDGES_PNG, draw_edges(weights))
    if folder.has(METRICS):  # not before the first step
        metrics = list(folder.read_lines(METRICS))
        titles, columns = stage_titles(folder.read_search_settings(), {line["problem"] for line in metrics})
        _save(folder, LOSSES_PNG, draw_losses(metrics, titles, columns))
        signals = draw_signals(metrics, titles)
        if signals is not None:
            _save(folder, SIGNALS_PNG, signals)


def draw_for_report(folder: RunFolder) -> None:
    """Draw what only a report shows: the problem graph, and the weights as an animation."""
    if folder.has(WEIGHTS):
        folder.write_bytes(HEAT_MAPS_GIF, animate_heat_maps(list(folder.read_lines(WEIGHTS))))
    if folder.has(GRAPH):
        titles, _ = stage_titles(folder.read_search_settings(), set())
        _save(folder, GRAPH_PNG, draw_graph(folder.read_text(GRAPH), titles))


def stage_titles(settings: SearchSettings, problems: set[str]) -> tuple[dict[str, str], int]:
    """Return the stages' titles, and how many belong to one round.

    Args:
        settings: of the search.
        problems: what the metrics call the problems; the stages of a joint search are those but the architecture.

    """
    if settings.algorithm == JOINT:
        return dict.fromkeys(sorted(problems - {ARCHITECTURE}), "all tasks together"), 1
    columns = len(settings.tasks)
    names = stage_names(columns, settings.rounds)
    rounds = [f"round {i // columns + 1}, " if settings.rounds > 1 else "" for i in range(len(names))]
    return {n: r + settings.tasks[i % columns] for i, (n, r) in enumerate(zip(names, rounds, strict=True))}, columns


def _save(folder: RunFolder, name: str, figure: Figure) -> None:
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    folder.write_bytes(name, drawn.getvalue())
