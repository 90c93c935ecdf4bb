"""Architectures beside each other, retrained and tested on the same tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.retrain import retrain
from examples.nas_interleaving.run_folder import RESULTS, TABLE, RunFolder
from examples.nas_interleaving.search_settings import RANDOM
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.status import COMPLETE, Tracker, describe
from examples.nas_interleaving.tables import make_table, make_verdict
from examples.nas_interleaving.tasks import Task


@dataclass(frozen=True)
class Candidate:
    """An architecture to retrain.

    Attributes:
        name: how it was found.
        genotype: the architecture.
        search_seconds: time of the search, 0 without one.
        search_passes: passes of the search, forward and reverse.
        note: what must be known where its results are read.

    """

    name: str
    genotype: Genotype
    search_seconds: float = 0.0
    search_passes: int = 0
    note: str = ""


def found_in(folder: RunFolder) -> Candidate:
    """Return the architecture of a search, with a note where the search has not come to its end."""
    status, settings = folder.read_status(), folder.read_search_settings()
    note = ""
    if status["state"] != COMPLETE:
        steps = settings.steps * max(1, len(settings.shrink_operations))
        note = f"The search is unfinished: {describe(status['state'])} after {status['steps']} of {steps} steps."
    elif "stopped" in status:
        how = status["stopped"]
        note = (
            f"The search ended early: {how['reason']}; this is the architecture of step {how['architecture_of_step']}."
        )
    passes = sum(status.get("passes", {}).values())
    return Candidate(settings.algorithm, folder.read_genotype(), status["seconds"], passes, note)


def drawn_at_random(nodes: int, seed: int) -> Candidate:
    """Draw an architecture of the same space."""
    return Candidate(RANDOM, Genotype.random(nodes, seed))


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
                "search_passes": candidate.search_passes,
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
