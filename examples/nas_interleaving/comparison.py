"""Architectures beside each other: searched by interleaving, drawn at random, searched by DARTS on one task."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.retrain import retrain
from examples.nas_interleaving.run_folder import RESULTS, TABLE, RunFolder
from examples.nas_interleaving.search import search
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.status import COMPLETE, Tracker, describe
from examples.nas_interleaving.tasks import Task

INTERLEAVING = "interleaving"
RANDOM = "random"


@dataclass(frozen=True)
class Candidate:
    """An architecture to retrain.

    Attributes:
        name: how it was found.
        genotype: the architecture.
        search_seconds: time of the search, 0 without one.
        note: what must be known where its results are read.

    """

    name: str
    genotype: Genotype
    search_seconds: float
    note: str = ""


def interleaved(folder: RunFolder, tasks: Sequence[Task], settings: SearchSettings) -> Candidate:
    """Search by interleaving learning on all tasks."""
    return _searched(INTERLEAVING, folder, tasks, settings)


def found_in(folder: RunFolder) -> Candidate:
    """Return the architecture of a search, with a note where the search has not come to its end."""
    status, settings = folder.read_status(), folder.read_search_settings()
    note = ""
    if status["state"] != COMPLETE:
        note = (
            f"The search is unfinished: {describe(status['state'])} after {status['steps']} of {settings.steps} steps."
        )
    return Candidate(INTERLEAVING, folder.read_genotype(), status["seconds"], note)


def drawn_at_random(settings: SearchSettings) -> Candidate:
    """Draw an architecture of the same space."""
    return Candidate(RANDOM, Genotype.random(settings.nodes, settings.seed), 0.0)


def by_darts(folder: RunFolder, task: Task, settings: SearchSettings) -> Candidate:
    """Search by plain DARTS on one task: one learner, one round, as many steps of the architecture."""
    alone = replace(settings, tasks=(task.name,), rounds=1, method=("finite-difference",))
    return _searched(f"DARTS on {task.name}", folder, [task], alone)


def _searched(name: str, folder: RunFolder, tasks: Sequence[Task], settings: SearchSettings) -> Candidate:
    genotype = search(folder, tasks, settings, title=f"search, {name}, seed {settings.seed}")
    return Candidate(name, genotype, folder.read_status()["seconds"])


class Evaluation:
    """Test results of architectures that are retrained, in a folder of their own; made by `evaluation`."""

    def __init__(self, folder: RunFolder, tasks: Sequence[Task], settings: RetrainSettings, status: Tracker) -> None:
        self._folder = folder
        self._tasks = tasks
        self._settings = settings
        self._status = status
        self._results: list[dict[str, Any]] = []

    def add(self, candidate: Candidate, seed: int) -> None:
        """Retrain an architecture on every task; the folder is current after each."""
        for task in self._tasks:
            title = f"retrain, {candidate.name}, {task.name}, seed {seed}"
            result = {
                "architecture": candidate.name,
                "seed": seed,
                "search_seconds": candidate.search_seconds,
                "note": candidate.note,
                **asdict(retrain(candidate.genotype, task, self._settings, seed, title=title)),
            }
            self._folder.append(RESULTS, result)
            self._results.append(result)
            self._status.count(len(self._results))
            self.write_table()

    def summary(self) -> str:
        """Return the table of the results, what they say, and what must be known of them."""
        notes = [f"Note on {r['architecture']}: {r['note']}" for r in self._results if r["note"]]
        if self._status.state != COMPLETE:
            state = describe(self._status.state)
            notes.append(f"This evaluation is unfinished: {state} after {len(self._results)} networks.")
        paragraphs = [make_table(self._results), make_verdict(self._results), "\n".join(dict.fromkeys(notes))]
        return "\n\n".join(filter(None, paragraphs))

    def write_table(self) -> None:
        """Keep the summary in the folder, if there is anything to sum up."""
        if self._results:
            self._folder.write_text(TABLE, self.summary())


@contextmanager
def evaluation(folder: RunFolder, tasks: Sequence[Task], settings: RetrainSettings) -> Iterator[Evaluation]:
    """Evaluate architectures in a `with` block; status and table say how it ended."""
    status = Tracker(folder, "networks")
    results = Evaluation(folder, tasks, settings, status)
    try:
        with status:
            folder.write_config(settings)
            yield results
    finally:
        results.write_table()


def make_table(results: Sequence[dict]) -> str:
    """Return test accuracies in per cent as Markdown: rows are architectures, columns tasks and their mean.

    Over several seeds it is mean ± standard deviation (of the sample). The mean over the tasks is taken per seed,
    so that its spread is that of the mean.
    """
    tasks = _tasks(results)
    rows = [["architecture", *tasks, "mean", "seeds", "parameters", "search, s"]]
    for name in dict.fromkeys(r["architecture"] for r in results):
        own = [r for r in results if r["architecture"] == name]
        columns = [[100 * r["accuracy"] for r in own if r["task"] == task] for task in tasks]
        columns.append(list(_means_by_seed(results, name).values()))
        rows.append(
            [
                name,
                *(_mean_and_spread(values) for values in columns),
                str(len({r["seed"] for r in own})),
                f"{statistics.fmean(r['parameters'] for r in own):,.0f}",
                f"{statistics.fmean(r['search_seconds'] for r in own):.0f}",
            ]
        )
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def make_verdict(results: Sequence[dict]) -> str:
    """Return what the results say of the first architecture beside each other one, over the seeds they share."""
    first, *others = dict.fromkeys(r["architecture"] for r in results)
    sentences = []
    for other in others:
        a, b = (_means_by_seed(results, name) for name in (first, other))
        differences = [a[seed] - b[seed] for seed in a if seed in b]
        if not differences:
            continue
        sentence = f"{first} − {other}: {statistics.fmean(differences):+.2f} points"
        if len(differences) == 1:
            sentence += " (one seed, so its spread is unknown)"
        else:
            spread = statistics.stdev(differences)
            inside = abs(statistics.fmean(differences)) <= spread
            sentence += f" ± {spread:.2f} over {len(differences)} seeds" + (", within the spread" if inside else "")
        sentences.append(sentence + ".")
    return "\n".join(sentences)


def _tasks(results: Sequence[dict]) -> list[str]:
    return list(dict.fromkeys(r["task"] for r in results))


def _means_by_seed(results: Sequence[dict], name: str) -> dict[int, float]:
    """Return the mean accuracy over all tasks in per cent, for each seed that has them all."""
    found: dict[int, dict[str, float]] = {}
    for r in results:
        if r["architecture"] == name:
            found.setdefault(r["seed"], {})[r["task"]] = 100 * r["accuracy"]
    count = len(_tasks(results))
    return {seed: statistics.fmean(by.values()) for seed, by in found.items() if len(by) == count}


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"
