"""Tables of test results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Results = Sequence[dict[str, Any]]

#: What a table shows beside accuracies: entry of the results → heading.
_MEANS = {
    "parameters": "parameters",
    "multiply_adds": "multiply-adds",
    "search_seconds": "search, s",
    "search_passes": "search passes",
}


def make_table(results: Results) -> str:
    """Return test accuracies in per cent as Markdown: rows are architectures, columns tasks and their mean.

    Over several seeds it is mean ± standard deviation (of the sample). The mean over the tasks is taken per seed,
    so that its spread is that of the mean. What stands behind is the mean over seeds and tasks.
    """
    tasks = _tasks(results)
    means = {key: heading for key, heading in _MEANS.items() if any(r.get(key) is not None for r in results)}
    rows = [["architecture", *tasks, "mean", "seeds", *means.values()]]
    for name in dict.fromkeys(r["architecture"] for r in results):
        own = [r for r in results if r["architecture"] == name]
        columns = [[100 * r["accuracy"] for r in own if r["task"] == task] for task in tasks]
        columns.append(list(_means_by_seed(results, name).values()))
        behind = [[r[key] for r in own if r.get(key) is not None] for key in means]
        rows.append(
            [
                name,
                *(_mean_and_spread(values) for values in columns),
                str(len({r["seed"] for r in own})),
                *(f"{statistics.fmean(values):,.0f}" if values else "–" for values in behind),
            ]
        )
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def make_verdict(results: Results) -> str:
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


def _tasks(results: Results) -> list[str]:
    return list(dict.fromkeys(r["task"] for r in results))


def _means_by_seed(results: Results, name: str) -> dict[int, float]:
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
