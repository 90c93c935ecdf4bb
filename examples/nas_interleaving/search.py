"""The search: runs the engine, and keeps what it does in a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

import mlo
from examples.nas_interleaving import plots
from examples.nas_interleaving.algorithms import build_engine, counted_in_steps, whole_space
from examples.nas_interleaving.collapse import Watch
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.genotype import CELL_KINDS, Genotype
from examples.nas_interleaving.passes import PassCounter
from examples.nas_interleaving.phases import Phase, phases, set_skip_dropout
from examples.nas_interleaving.progress import progress
from examples.nas_interleaving.run_folder import GENOTYPE, METRICS, WEIGHTS, RunFolder
from examples.nas_interleaving.search_settings import RANDOM, SearchSettings
from examples.nas_interleaving.spaces import SearchSpace
from examples.nas_interleaving.stages import ARCHITECTURE, architecture_of
from examples.nas_interleaving.status import Tracker
from examples.nas_interleaving.tasks import Task


def search(
    folder: RunFolder,
    tasks: Sequence[Task],
    settings: SearchSettings,
    data: DataSettings | None = None,
    *,
    title: str = "search",
    draw: bool = True,
) -> Genotype:
    """Search an architecture and return it; the folder gets configuration, metrics, genotype and drawings.

    The tasks are those given, whatever names stand in the settings; the folder records the names of those given, and
    the settings by which they were loaded. An interruption leaves the folder as complete as the search itself, and is
    raised again. Without `draw` there are no drawings until the search is plotted.
    """
    settings = counted_in_steps(tasks, settings)
    run = _Search(folder, tasks, settings)
    try:
        with Tracker(folder, "steps") as status:
            folder.write_config(replace(settings, tasks=tuple(task.name for task in tasks)), data)
            if settings.algorithm == RANDOM:
                folder.write_text(GENOTYPE, Genotype.random(settings.nodes, settings.seed).to_json())
            else:
                run.all_phases(status, title)
    finally:
        if folder.has(WEIGHTS):  # the end can come before them
            folder.write_text(GENOTYPE, folder.decode_weights(run.chosen_step).to_json())
        if draw and folder.has(GENOTYPE):
            plots.draw_run(folder)
    return folder.read_genotype()


class _Search:
    """One search under way."""

    def __init__(self, folder: RunFolder, tasks: Sequence[Task], settings: SearchSettings) -> None:
        self._folder = folder
        self._tasks = tasks
        self._settings = settings
        self._passes = PassCounter()
        self._watch = Watch(settings)
        self._before = 0  # steps of the phases before
        self.chosen_step: int | None = None

    def all_phases(self, status: Tracker, title: str) -> None:
        parts = phases(self._settings)
        space = whole_space(self._settings)
        weights = None
        with progress(len(parts) * self._settings.steps, title) as bar:
            for phase in parts:
                if weights is not None:
                    space = space.shrunk(weights, phase.operations)
                weights = self._one_phase(phase, space, status, bar)
                self._before += self._settings.steps

    def _one_phase(self, phase: Phase, space: SearchSpace, status: Tracker, bar: tqdm) -> dict[str, torch.Tensor]:
        engine = build_engine(self._tasks, phase.settings, space)
        networks = [p.module for name, p in engine.problems.items() if name != ARCHITECTURE]
        self._passes.attach(networks)
        if self._before == 0:
            self._folder.write_text("graph.txt", str(engine.graph))
            self._folder.write_text("graph.mmd", engine.graph.to_mermaid())
            self._record_weights(engine)
        set_skip_dropout(networks, phase.skip_dropout)

        def after_step(engine: mlo.Engine, reports: dict[str, mlo.ProblemReport]) -> None:
            self._record(engine, reports, status)
            set_skip_dropout(networks, phase.skip_dropout_after(engine.step_count))
            _show(bar, engine, reports)
            self._stop_if_collapsed(engine, reports, status)

        engine.run(phase.settings.steps, validate_every=phase.settings.validate_every, callbacks=[after_step])
        with torch.no_grad():
            return architecture_of(engine).weights()

    def _record(self, engine: mlo.Engine, reports: dict[str, mlo.ProblemReport], status: Tracker) -> None:
        step = self._before + engine.step_count
        self._folder.append(METRICS, *(_line(step, engine, name, report) for name, report in reports.items()))
        self._record_weights(engine)
        status.note(passes=self._passes.counts())
        status.count(step)  # last, so that no step counts that is not recorded

    def _record_weights(self, engine: mlo.Engine) -> None:
        with torch.no_grad():
            weights = architecture_of(engine).weights()
        rounded = {kind: [[round(w, 6) for w in row] for row in weights[kind].tolist()] for kind in CELL_KINDS}
        self._folder.append(WEIGHTS, {"step": self._before + engine.step_count, **rounded})

    def _stop_if_collapsed(self, engine: mlo.Engine, reports: dict[str, mlo.ProblemReport], status: Tracker) -> None:
        report = reports[ARCHITECTURE]
        if report.validation is None or report.outcome == "warm-up":
            return
        if self._watch.look(engine.step_count, report.validation):
            engine.stop()
            self.chosen_step = self._watch.step
            status.note(stopped={"reason": self._watch.reason, "architecture_of_step": self.chosen_step})


def _line(step: int, engine: mlo.Engine, name: str, report: mlo.ProblemReport) -> dict[str, Any]:
    optimizer = engine.problems[name].optimizer
    assert optimizer is not None, name
    return {
        "step": step,
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
