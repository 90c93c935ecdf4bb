"""Time and reverse passes against the number of stages."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mlo.bench.experiments.measured import Measurement, described, measured, refusal, relative_error
from mlo.bench.experiments.settings import Settings, Task
from mlo.bench.libraries.base import Library
from mlo.bench.problems import chain, digits_chain
from mlo.bench.problems.chain import TOPOLOGIES
from mlo.bench.records import Record
from mlo.bench.specification import Method
from mlo.bench.stage import Case

NAME = "chains"
SUMMARY = "time and reverse passes against the number of stages, in three topologies"

_METHODS = ("fd", "cg:5")
_LENGTHS = {"chain": chain.LENGTHS, "digits-chain": digits_chain.LENGTHS}
_QUICK_LENGTHS = {"chain": (2, 4, 8)}
_ROUNDS = 15


def tasks(settings: Settings) -> list[Task]:
    """Return a task for each topology, seed, method and length; those of the first three share what they know."""
    return [
        task
        for problem, lengths in (_QUICK_LENGTHS if settings.quick else _LENGTHS).items()
        for topology in TOPOLOGIES
        for task in _tasks(settings, problem, topology, lengths)
    ]


def _tasks(settings: Settings, problem: str, topology: str, lengths: tuple[int, ...]) -> list[Task]:
    sizes = settings.chosen_sizes(problem, tuple(f"{topology}-{length}" for length in lengths))
    sizes = tuple(size for size in sizes if size.startswith(f"{topology}-"))
    found = []
    for seed in settings.seeds:
        for method in settings.chosen_methods(_METHODS):
            growth = {library.name: Growth() for library in settings.libraries}
            found += [_task(settings, problem, size, seed, method, growth) for size in sizes]
    return found


class Growth:
    """What the last few lengths took, to tell what the next one would take.

    >>> growth = Growth()
    >>> growth.note(4, 1.0)
    >>> growth.expected(8) is None
    True
    >>> growth.note(6, 4.0)
    >>> growth.expected(8)
    16.0

    """

    def __init__(self) -> None:
        """Know nothing."""
        self._known: list[tuple[int, float]] = []

    def note(self, length: int, seconds: float) -> None:
        """Keep the seconds at a length."""
        self._known.append((length, seconds))

    def expected(self, length: int) -> float | None:
        """Return the seconds at a greater length if each stage more costs the same factor as before.

        An upper bound for what grows as a power of the length, and right for what doubles with each stage.
        """
        if len(self._known) < 2:
            return None
        (a, before), (b, last) = self._known[max(0, len(self._known) - 3)], self._known[-1]
        rate = math.log(max(last, 1e-9) / max(before, 1e-9)) / (b - a)
        return last * math.exp(min(max(rate, 0.0) * (length - b), 50.0))


def _task(settings: Settings, problem: str, size: str, seed: int, method: Method, growth: dict[str, Growth]) -> Task:
    dtype = settings.dtype or "float32"
    topology, length = size.split("-")

    def run() -> Iterator[Record]:
        case = settings.case(problem, size, seed, dtype)
        able = {}
        for library in settings.libraries:
            reason = _reason(library, case, method, settings, growth[library.name], int(length))
            if reason is None:
                able[library.name] = library
            elif library.name in _COMPARED:
                yield {"library": library.name, "failure": reason}
        found = measured(able, case, method, settings, rounds=_ROUNDS, memory=False)
        for name, measurement in found.items():
            if measurement.seconds is not None:
                growth[name].note(int(length), measurement.seconds.median)
            record = {"library": name, "version": able[name].version(), "difference": _difference(found, name)}
            yield {**record, **measurement.as_record()}

    head = {"experiment": NAME, "problem": problem, "size": size, "seed": seed, "dtype": dtype}
    head |= {"topology": topology, "stages": int(length), "method": str(method), "budget": method.budget}
    return Task(head, run)


# The others have no graphs of stages: saying so once, in the accuracy of chains, is enough.
_COMPARED = ("mlo", "by-hand", "betty")


def _reason(
    library: Library, case: Case, method: Method, settings: Settings, growth: Growth, length: int
) -> str | None:
    reason = refusal(library, case, method)
    if reason is not None:
        return reason
    expected = growth.expected(length)
    if expected is not None and expected > settings.time_limit:
        return (
            f"left out: about {_approximate(expected)} by the growth so far, over --time-limit {settings.time_limit:g}"
        )
    return None


def _approximate(seconds: float) -> str:
    """Return a duration in two digits.

    >>> _approximate(1234.0), _approximate(1e7)
    ('1200 s', '1e+07 s')

    """
    return f"{float(f'{seconds:.1e}'):.0f} s" if seconds < 1e6 else f"{seconds:.0e} s"


def _difference(found: dict[str, Measurement], name: str) -> float | None:
    """Return how far a result is from the hand-written sweep's."""
    reference = found.get("by-hand")
    if reference is None or reference.result is None or found[name].result is None:
        return None
    try:
        difference = relative_error(found[name].result, reference.result)
    except Exception as problem:
        found[name].failure = described(problem)
        return None
    return difference if math.isfinite(difference) else None
