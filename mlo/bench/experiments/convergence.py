"""The outer objective over outer steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

from mlo.bench.experiments.measured import described, refusal
from mlo.bench.experiments.settings import Settings, Task
from mlo.bench.libraries.base import Library
from mlo.bench.measure.clock import timed
from mlo.bench.records import Record
from mlo.bench.specification import Method
from mlo.bench.stage import Case

NAME = "convergence"
SUMMARY = "the outer objective over outer steps, by method"

_SIZES = {
    "ridge": ("breast-cancer",),
    "cleaning": ("digits", "fashion-mnist"),
    "maml": ("8-tasks",),
    "reweighting": ("digits", "fashion-mnist"),
}
_QUICK_SIZES = {"ridge": ("breast-cancer",), "maml": ("8-tasks",)}
_METHODS = ("fd", "neumann:20", "cg:5", "cg:20", "unroll:10")
_QUICK_METHODS = ("fd", "cg:5")
# Far from its solution an MLP's Hessian has negative eigenvalues: no linear solves there.
_NETWORK_METHODS = ("fd", "identity", "neumann:5")
_STEPS, _QUICK_STEPS = 100, 10
_NETWORKS = ("reweighting",)


def tasks(settings: Settings) -> list[Task]:
    """Return a task for each problem, size, seed and method."""
    dtype = settings.dtype or "float32"
    found = []
    for problem, usual in (_QUICK_SIZES if settings.quick else _SIZES).items():
        methods = _QUICK_METHODS if settings.quick else _NETWORK_METHODS if problem in _NETWORKS else _METHODS
        for size in settings.chosen_sizes(problem, usual):
            for seed in settings.seeds:
                head = {"experiment": NAME, "problem": problem, "size": size, "seed": seed, "dtype": dtype}
                case = partial(settings.case, problem, size, seed, dtype)
                found += [
                    Task({**head, "method": str(m), "budget": m.budget}, partial(_records, settings, case, m))
                    for m in settings.chosen_methods(methods)
                ]
    return found


def _records(settings: Settings, build: Callable[[], Case], method: Method) -> Iterator[Record]:
    case = build()
    for library in settings.libraries:
        reason = refusal(library, case, method)
        if reason is None:
            yield {"library": library.name, **_trained(settings, library, case, method)}
        else:
            yield {"library": library.name, "failure": reason}


def _trained(settings: Settings, library: Library, case: Case, method: Method) -> Record:
    """Train, and return the outer objective before and after each step, and the seconds in the steps alone."""
    steps = _QUICK_STEPS if settings.quick else _STEPS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            training = library.training(case, method)
            if training is None:
                return {"failure": "it has no training loop for this"}
            objective, seconds = [training.metric()], 0.0
            for _ in range(steps):
                seconds += timed(training.step, settings.device)
                objective.append(training.metric())
        except Exception as error:
            return {"failure": described(error)}
    finite = [value if math.isfinite(value) else None for value in objective]
    return {"version": library.version(), "objective": finite, "training_seconds": seconds}
