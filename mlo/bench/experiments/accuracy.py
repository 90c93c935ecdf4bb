"""How far approximations are from the exact hypergradient, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from mlo.bench.experiments.measured import Measurement, described, measured, refusal, relative_error
from mlo.bench.experiments.settings import Settings, Task
from mlo.bench.records import Record
from mlo.bench.specification import Method
from mlo.bench.stage import Case, Gradient

NAME = "accuracy"
SUMMARY = "error of each approximation against the exact hypergradient, with its time, reverse passes and memory"

_SIZES = {
    "ridge": ("50", "breast-cancer", "200"),
    "logistic": ("breast-cancer", "digits"),
    "cleaning": ("breast-cancer", "digits"),
    "ill-conditioned": ("1e2", "1e4", "1e6"),
    "maml": ("8-tasks",),
    "chain": ("last-4", "dense-4", "dense-8"),
    "nested": ("quadratic-3", "curved-3"),
}
_QUICK_SIZES = {"ridge": ("50",), "logistic": ("breast-cancer",), "chain": ("dense-4",), "nested": ("curved-3",)}
_METHODS = (
    *("fd", "identity", "neumann:5", "neumann:20", "neumann:100", "cg:1", "cg:5", "cg:20", "cg:50"),
    *("gmres:20", "minres:20", "nystrom:20", "unroll:20", "unroll:100", "dense"),
)
_QUICK_METHODS = ("fd", "neumann:20", "cg:5", "cg:20", "unroll:20")
# Three unknowns at each level, and products that need solves of the level below.
_QUICK_NESTED_METHODS = ("identity", "cg:2", "cg:3")
_NESTED_METHODS = ("fd", "identity", "neumann:5", "neumann:20", "cg:1", "cg:2", "cg:3", "gmres:3", "minres:3", "dense")
_ROUNDS = 25


def tasks(settings: Settings) -> list[Task]:
    """Return a task for each problem, size, seed and method."""
    found = []
    for problem, usual in (_QUICK_SIZES if settings.quick else _SIZES).items():
        methods: tuple[str, ...] = _QUICK_METHODS if settings.quick else _METHODS
        if problem == "nested":
            methods = _QUICK_NESTED_METHODS if settings.quick else _NESTED_METHODS
        for size in settings.chosen_sizes(problem, usual):
            for seed in settings.seeds:
                found += _tasks_of(settings, problem, size, seed, settings.chosen_methods(methods))
    return found


def _tasks_of(settings: Settings, problem: str, size: str, seed: int, methods: tuple[Method, ...]) -> list[Task]:
    dtype = settings.dtype or "float64"
    built: list[Case] = []

    def run(method: Method) -> Iterator[Record]:
        if not built:  # once for all methods, and not before the first one's turn
            built.append(settings.case(problem, size, seed, dtype))
        yield from _records(settings, built[0], method)

    head = {"experiment": NAME, "problem": problem, "size": size, "seed": seed, "dtype": dtype}
    return [Task({**head, "method": str(m), "budget": m.budget}, partial(run, m)) for m in methods]


def _records(settings: Settings, case: Case, method: Method) -> Iterator[Record]:
    if case.exact is None:
        return
    exact = case.exact()
    able = {}
    for library in settings.libraries:
        reason = refusal(library, case, method)
        if reason is None:
            able[library.name] = library
        else:
            yield {"library": library.name, "failure": reason}
    for name, measurement in measured(able, case, method, settings, rounds=_ROUNDS).items():
        record = {"library": name, "version": able[name].version(), "error": _error(measurement, exact)}
        yield {**record, **measurement.as_record()}


def _error(measurement: Measurement, exact: Gradient) -> float | None:
    if measurement.failure is not None:
        return None
    try:
        error = relative_error(measurement.result, exact)
    except Exception as problem:
        measurement.failure = described(problem)
        return None
    if math.isfinite(error):
        return error
    measurement.failure = "the hypergradient is not finite"
    return None
