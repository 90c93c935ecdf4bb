"""The search: runs the engine, and keeps what it does in a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import mlo
from examples.nas_interleaving import plots
from examples.nas_interleaving.genotype import CELL_KINDS, Genotype
from examples.nas_interleaving.interleaving import ARCHITECTURE, build_engine
from examples.nas_interleaving.progress import progress
from examples.nas_interleaving.run_folder import GENOTYPE, METRICS, WEIGHTS, RunFolder
from examples.nas_interleaving.settings import SearchSettings
from examples.nas_interleaving.status import Tracker
from examples.nas_interleaving.supernet import edge_weights
from examples.nas_interleaving.tasks import Task


def search(folder: RunFolder, tasks: Sequence[Task], settings: SearchSettings, *, title: str = "search") -> Genotype:
    """Search an architecture and return it; the folder gets configuration, metrics, genotype and drawings.

    The tasks are those given, whatever names stand in the settings; the folder records the names of those given.
    An interruption leaves the folder as complete as the search itself, and is raised again.
    """
    engine = build_engine(tasks, settings)
    try:
        with Tracker(folder, "steps") as status:
            folder.write_config(replace(settings, tasks=tuple(task.name for task in tasks)))
            folder.write_text("graph.txt", str(engine.graph))
            folder.write_text("graph.mmd", engine.graph.to_mermaid())
            _record_weights(folder, engine)
            with progress(settings.steps, title) as bar:
                engine.run(
                    settings.steps,
                    validate_every=settings.validate_every,
                    callbacks=[partial(_record, folder, status), partial(_show, bar)],
                )
    finally:
        if folder.has(WEIGHTS):  # the end can come before them
            folder.write_text(GENOTYPE, folder.decode_weights().to_json())
            plots.draw_run(folder)
    return folder.read_genotype()


def _record_weights(folder: RunFolder, engine: mlo.Engine) -> None:
    with torch.no_grad():
        weights = edge_weights(dict(engine.problems[ARCHITECTURE].module.named_parameters()))
    rounded = {kind: [[round(w, 6) for w in row] for row in weights[kind].tolist()] for kind in CELL_KINDS}
    folder.append(WEIGHTS, {"step": engine.step_count, **rounded})


def _record(folder: RunFolder, status: Tracker, engine: mlo.Engine, reports: dict[str, mlo.ProblemReport]) -> None:
    folder.append(METRICS, *(_line(engine, name, report) for name, report in reports.items()))
    _record_weights(folder, engine)
    status.count(engine.step_count)  # last, so that no step counts that is not recorded


def _line(engine: mlo.Engine, name: str, report: mlo.ProblemReport) -> dict[str, Any]:
    optimizer = engine.problems[name].optimizer
    assert optimizer is not None, name
    return {
        "step": engine.step_count,
        "problem": name,
        "outcome": report.outcome,
        "loss": report.loss,
        "gradient_norm": report.gradient_norm,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "metrics": dict(report.metrics),
        "validation": None if report.validation is None else dict(report.validation),
        "solves": {
            path: {
                "solves": solves.solves,
                "products": solves.products,
                "statuses": {status.name: count for status, count in solves.statuses.items()},
            }
            for path, solves in report.solves.items()
        },
    }


def _show(bar: tqdm, _: mlo.Engine, reports: dict[str, mlo.ProblemReport]) -> None:
    loss = reports[ARCHITECTURE].loss
    bar.set_postfix_str("warm-up" if loss is None else f"validation loss {loss:.3f}", refresh=False)
    bar.update()
