"""The search: runs the engine, and keeps what it does in a run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import mlo
from examples.nas_interleaving import plots
from examples.nas_interleaving.genotype import CELL_KINDS, Genotype
from examples.nas_interleaving.interleaving import ARCHITECTURE, build_engine
from examples.nas_interleaving.progress import progress
from examples.nas_interleaving.run_folder import GENOTYPE, METRICS, STATUS, WEIGHTS, RunFolder
from examples.nas_interleaving.settings import SearchSettings
from examples.nas_interleaving.supernet import edge_weights
from examples.nas_interleaving.tasks import Task


def search(folder: RunFolder, tasks: Sequence[Task], settings: SearchSettings, *, title: str = "search") -> Genotype:
    """Search an architecture and return it; the folder gets configuration, metrics, genotype and drawings.

    An interruption leaves the folder as complete as the search itself, and is raised again.
    """
    folder.write_config(settings)
    engine = build_engine(tasks, settings)
    folder.write_text("graph.txt", str(engine.graph))
    folder.write_text("graph.mmd", engine.graph.to_mermaid())
    started = time.perf_counter()
    state = "failed"
    _record_weights(folder, engine)
    try:
        with progress(settings.steps, title) as bar:
            engine.run(
                settings.steps,
                validate_every=settings.validate_every,
                callbacks=[partial(_record, folder), partial(_show, bar)],
            )
        state = "complete"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        seconds = round(time.perf_counter() - started, 3)
        folder.write_json(STATUS, {"state": state, "steps": engine.step_count, "seconds": seconds})
        genotype = Genotype.decode(_weights(engine))
        folder.write_text(GENOTYPE, genotype.to_json())
        plots.draw_run(folder, tasks=[task.name for task in tasks])
    return genotype


def _weights(engine: mlo.Engine) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return edge_weights(dict(engine.problems[ARCHITECTURE].module.named_parameters()))


def _record_weights(folder: RunFolder, engine: mlo.Engine) -> None:
    weights = _weights(engine)
    rounded = {kind: [[round(w, 6) for w in row] for row in weights[kind].tolist()] for kind in CELL_KINDS}
    folder.append(WEIGHTS, {"step": engine.step_count, **rounded})


def _record(folder: RunFolder, engine: mlo.Engine, reports: dict[str, mlo.ProblemReport]) -> None:
    folder.append(METRICS, *(_line(engine, name, report) for name, report in reports.items()))
    _record_weights(folder, engine)


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
