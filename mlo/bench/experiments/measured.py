"""One case by several libraries: what each gives, and what it costs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mlo.bench.experiments.settings import Settings
from mlo.bench.libraries.base import Library
from mlo.bench.measure.clock import Seconds, alternating
from mlo.bench.measure.memory import peak_bytes
from mlo.bench.measure.passes import reverse_passes
from mlo.bench.records import Record
from mlo.bench.specification import Method
from mlo.bench.stage import Case, Gradient

# A call that takes longer is timed once, by its first run.
_LONG = 4.0
# One that takes longer is not run again under the profiler.
_LONG_FOR_MEMORY = 2.0


@dataclass
class Measurement:
    """What became of one library.

    Attributes:
        result: what its first call returned.
        seconds: of its calls.
        reverse_passes: of one call.
        memory_bytes: the peak of one call.
        warnings: what it warned of.
        failure: why there is nothing else.

    """

    result: Any = None
    seconds: Seconds | None = None
    reverse_passes: int | None = None
    memory_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)
    failure: str | None = None

    def as_record(self) -> Record:
        """Return the fields of a record."""
        return {
            "seconds": None if self.seconds is None else self.seconds.as_record(),
            "reverse_passes": self.reverse_passes,
            "memory_bytes": self.memory_bytes,
            "warnings": self.warnings or None,
            "failure": self.failure,
        }


def refusal(library: Library, case: Case, method: Method) -> str | None:
    """Return why a library has nothing to say on a case."""
    try:
        return library.unavailable() or library.refuses(case, method)
    except Exception as error:
        return described(error)


def described(error: BaseException) -> str:
    """Return an exception in one line."""
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:500]


def measured(
    libraries: Mapping[str, Library],
    case: Case,
    method: Method,
    settings: Settings,
    *,
    rounds: int,
    memory: bool = True,
) -> dict[str, Measurement]:
    """Prepare each library, call it once for its result, time all in turn, and count.

    Args:
        libraries: those that can, by name.
        case: the problem.
        method: the approximation.
        settings: the repetitions and the device.
        rounds: timed runs, unless the settings say otherwise.
        memory: whether memory is measured.

    """
    found = {name: Measurement() for name in libraries}
    ready: dict[str, Callable[[], Any]] = {}
    for name, library in libraries.items():
        call = _first(found[name], partial(library.hypergradient, case, method), library.passes_countable)
        if call is not None:
            ready[name] = call
    rounds = settings.repetitions or rounds
    with _quiet():
        # What has threads of its own disturbs the call after it, which an untimed one takes away.
        settle = not all(libraries[name].countable for name in ready)
        _time(found, ready, settings, rounds, settle)
        for name, call in ready.items():
            _count(found[name], call, libraries[name], settings.device, memory)
    return found


def _first(
    measurement: Measurement, prepare: Callable[[], Callable[[], Any]], countable: bool
) -> Callable[[], Any] | None:
    """Prepare and make the first call; keep its result, its warnings, or why it failed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call = prepare()
            began = time.perf_counter()
            kept: list[Any] = []
            passes = reverse_passes(lambda: kept.append(call()))
            measurement.seconds = Seconds.of([time.perf_counter() - began])
            # A copy: later calls may write to the same tensors.
            measurement.result = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), kept[0])
            measurement.reverse_passes = passes if countable else None
        except Exception as error:
            measurement.failure = described(error)
            return None
        finally:
            measurement.warnings = sorted({f"{w.category.__name__}: {w.message}"[:300] for w in caught})
    return call


def _time(
    found: Mapping[str, Measurement],
    ready: Mapping[str, Callable[[], Any]],
    settings: Settings,
    rounds: int,
    settle: bool,
) -> None:
    fast = {name: call for name, call in ready.items() if _seconds(found[name]) < _LONG}
    try:
        times = alternating(fast, rounds=rounds, seconds=settings.seconds, device=settings.device, settle=settle)
    except Exception as error:
        for name in fast:
            found[name].warnings.append(f"timed once only, since one of the runs failed: {described(error)}")
        return
    for name, runs in times.items():
        found[name].seconds = Seconds.of(runs)


def _count(
    measurement: Measurement, call: Callable[[], Any], library: Library, device: torch.device, memory: bool
) -> None:
    if not library.countable or _seconds(measurement) > _LONG:
        return
    try:
        # The least of two calls: a library may make checks in its first ones, and now and then.
        if library.passes_countable:
            measurement.reverse_passes = min(reverse_passes(call) or 0 for _ in range(2)) or None
        if memory and _seconds(measurement) < _LONG_FOR_MEMORY:
            measurement.memory_bytes = peak_bytes(call, device)
    except Exception as error:
        measurement.warnings.append(f"failed while passes and memory were counted: {described(error)}")


def _seconds(measurement: Measurement) -> float:
    assert measurement.seconds is not None
    return measurement.seconds.median


@contextmanager
def _quiet() -> Iterator[None]:
    """Let no warnings through: those of the first call are kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def relative_error(found: Gradient, exact: Gradient) -> float:
    """Return ‖found − exact‖ / ‖exact‖ over all tensors, in float64 on the CPU.

    Raises:
        ValueError: names or shapes are not the same.

    """
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in exact.items()}:
        raise ValueError(
            f"expected a hypergradient with {_shapes(exact)}; the library returned one with {_shapes(found)}."
        )
    away = math.hypot(*(_norm(found[n].detach().cpu().double() - exact[n].cpu().double()) for n in exact))
    return away / math.hypot(*(_norm(t.cpu().double()) for t in exact.values()))


def _shapes(gradient: Gradient) -> str:
    return ", ".join(f"{name} of {tuple(t.shape)}" for name, t in sorted(gradient.items()))


def _norm(t: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(t))
