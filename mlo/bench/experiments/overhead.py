"""Whole outer steps against the leanest loop of the same arithmetic that one can write by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch

from mlo.bench.experiments.measured import described, refusal, relative_error
from mlo.bench.experiments.settings import Settings, Task
from mlo.bench.libraries.base import Library, Training
from mlo.bench.libraries.by_hand import ByHand
from mlo.bench.measure.clock import Ratio, Seconds, alternating
from mlo.bench.measure.memory import peak_bytes
from mlo.bench.measure.passes import reverse_passes
from mlo.bench.records import Record
from mlo.bench.specification import Method
from mlo.bench.stage import Case

NAME = "overhead"
SUMMARY = "an outer step of each library against the leanest hand-written loop of the same arithmetic"

_SIZES = {"reweighting": ("random", "random-decay"), "supernet": ("small",)}
_QUICK_SIZES = {"reweighting": ("random", "random-decay")}
# With its decay the Hessian is positive definite; elsewhere it is not, and solvers end at different steps.
_METHODS = {"random-decay": ("cg:5",)}
_USUAL_METHODS = ("fd",)
_PAIRS, _QUICK_PAIRS = 100, 10
# Steps before the clock runs: caches fill, and the checks that the engine makes at first are over.
_WARM_UP = 10
_SECONDS_PER_PAIR, _QUICK_SECONDS_PER_PAIR = 3.0, 1.0


def tasks(settings: Settings) -> list[Task]:
    """Return a task for each case and seed."""
    return [
        _task(settings, problem, size, seed, method)
        for problem, usual in (_QUICK_SIZES if settings.quick else _SIZES).items()
        for size in settings.chosen_sizes(problem, usual)
        for method in settings.chosen_methods(_METHODS.get(size, _USUAL_METHODS))
        for seed in settings.seeds
    ]


def _task(settings: Settings, problem: str, size: str, seed: int, method: Method) -> Task:
    dtype = settings.dtype or "float32"
    head = {"experiment": NAME, "problem": problem, "size": size, "seed": seed, "dtype": dtype}
    return Task(
        {**head, "method": str(method), "budget": method.budget},
        lambda: _records(settings, settings.case(problem, size, seed, dtype), method),
        threads=2,
    )


def _records(settings: Settings, case: Case, method: Method) -> Iterator[Record]:
    by_hand = ByHand()
    reason = by_hand.refuses(case, method)
    if reason is not None:
        yield {"library": by_hand.name, "failure": reason}
        return
    yield from _compared(settings, case, method, by_hand, by_hand.training(case, method))
    for library in settings.libraries:
        if library.name == by_hand.name:
            continue
        loop = _loop(library, case, method)
        if isinstance(loop, str):
            yield {"library": library.name, "failure": loop}
            continue
        try:
            yield from _compared(settings, case, method, library, loop)
        except Exception as error:
            yield {"library": library.name, "failure": described(error)}


def _loop(library: Library, case: Case, method: Method) -> Training | str:
    """Return a library's loop after some steps, or why there is none."""
    reason = refusal(library, case, method)
    if reason is not None:
        return reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loop = library.training(case, method)
            if loop is None:
                return "it has no training loop for this"
            loop.step()
        except Exception as error:
            return described(error)
    return loop


def _compared(settings: Settings, case: Case, method: Method, library: Library, loop: Training) -> Iterator[Record]:
    """Compare a library with two loops by hand, without the others, which would drive its code out of the caches."""
    loops = {"reference": ByHand().training(case, method), "again": ByHand().training(case, method), "measured": loop}
    pairs = settings.repetitions or (_QUICK_PAIRS if settings.quick else _PAIRS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in loops.values():
            for _ in range(_WARM_UP):
                each.step()
        times = alternating(
            {name: each.step for name, each in loops.items()},
            rounds=pairs,
            seconds=pairs * (_QUICK_SECONDS_PER_PAIR if settings.quick else _SECONDS_PER_PAIR),
            device=settings.device,
            # In training a step follows one of the same loop. After another library's it finds its code and its data
            # driven out of the caches, which costs the more the less arithmetic there is.
            settle=True,
        )
        yield {
            "library": library.name,
            "version": library.version(),
            "seconds": Seconds.of(times["measured"]).as_record(),
            "reverse_passes": reverse_passes(loop.step) if library.passes_countable else None,
            "memory_bytes": peak_bytes(loop.step, settings.device),
            "ratio": Ratio.of(times["measured"], times["reference"]).as_record(),
            "raw_ratio": Ratio.of(times["again"], times["reference"]).as_record(),
            "difference": relative_error(library.hypergradient(case, method)(), ByHand().hypergradient(case, method)()),
            "objective": loop.metric(),
            "state_bytes": state_bytes(case),
        }


def state_bytes(case: Case) -> int:
    """Return the bytes of the parameters and buffers of all stages."""
    modules = [stage.module() for stage in case.stages]
    tensors: list[torch.Tensor] = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors)
