"""Architectures beside each other: searched by interleaving, drawn at random, searched by DARTS on one task."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.retrain import TestResult, retrain
from examples.nas_interleaving.run_folder import RESULTS, TABLE, RunFolder
from examples.nas_interleaving.search import search
from examples.nas_interleaving.settings import RetrainSettings, SearchSettings
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

    """

    name: str
    genotype: Genotype
    search_seconds: float


def interleaved(folder: RunFolder, tasks: Sequence[Task], settings: SearchSettings) -> Candidate:
    """Search by interleaving learning on all tasks."""
    return _searched(INTERLEAVING, folder, tasks, settings)


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


def evaluate(
    folder: RunFolder, candidate: Candidate, tasks: Sequence[Task], settings: RetrainSettings, seed: int
) -> list[TestResult]:
    """Retrain an architecture on every task, and add the results to the folder as they come."""
    results = []
    for task in tasks:
        title = f"retrain, {candidate.name}, {task.name}, seed {seed}"
        result = retrain(candidate.genotype, task, settings, seed, title=title)
        folder.append(
            RESULTS,
            {
                "architecture": candidate.name,
                "seed": seed,
                "search_seconds": candidate.search_seconds,
                **asdict(result),
            },
        )
        results.append(result)
    return results


def summarise(folder: RunFolder) -> str:
    """Return the table of all results in the folder with a sentence on it, and keep the two there."""
    results = list(folder.read_lines(RESULTS))
    text = f"{make_table(results)}\n\n{make_verdict(results)}"
    folder.write_text(TABLE, text)
    return text


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
