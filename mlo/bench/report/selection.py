"""Records grouped and put together for tables and plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlo.bench.records import Record

# What tells one measurement from another; seeds are put together, and of a repeated one the last counts.
_KEY = ("experiment", "problem", "size", "method", "library", "dtype", "threads", "variant")
_AVERAGED = ("error", "difference", "reverse_passes", "memory_bytes")


@dataclass(frozen=True)
class Machine:
    """Records of one machine, device and commit.

    Attributes:
        title: the machine in words.
        versions: of the software, in words.
        records: what was measured there.

    """

    title: str
    versions: str
    records: tuple[Record, ...]

    def of(self, experiment: str) -> list[Record]:
        """Return the records of an experiment."""
        return [r for r in self.records if r["experiment"] == experiment]


def machines(records: Sequence[Record]) -> list[Machine]:
    """Group records by where they were made, in their order, and put seeds together."""
    found = []
    for group in grouped(records, _place).values():
        environment = group[0]["environment"]
        place = environment["gpu"] or f"{environment['processor']}, {environment['cores']} cores"
        title = place
        names = ("python", "torch", "numpy", "mlo", "commit")
        versions = ", ".join(f"{name} {environment[name]}" for name in names if environment[name] is not None)
        found.append(Machine(title, versions, tuple(together(group))))
    return found


def _place(record: Record) -> tuple[Any, ...]:
    environment = record["environment"]
    return tuple(environment[key] for key in ("processor", "cores", "gpu", "commit", "torch"))


def together(records: Iterable[Record]) -> list[Record]:
    """Return one record per measurement: the median over seeds, and of repeated ones the last."""
    found = []
    for group in grouped(records, lambda r: tuple(r.get(key) for key in _KEY)).values():
        seeds = [one[-1] for one in grouped(group, lambda r: r["seed"]).values()]
        done = [r for r in seeds if r["failure"] is None] or seeds[-1:]
        merged = dict(done[0])
        for key in _AVERAGED:
            values = [r[key] for r in done if r.get(key) is not None]
            if values:
                merged[key] = statistics.median(values)
        times = [r["seconds"] for r in done if r["seconds"] is not None]
        if times:
            merged["seconds"] = {key: statistics.median(t[key] for t in times) for key in times[0]}
        found.append(merged)
    return found


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Return records by a key, in their order."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def case_of(record: Record) -> str:
    """Return the problem with its size."""
    return f"{record['problem']}, {record['size']}"


def in_order(records: Iterable[Record], field: str) -> list[Any]:
    """Return the values of a field, each once, in the order in which they come first."""
    return list(dict.fromkeys(r[field] for r in records))
