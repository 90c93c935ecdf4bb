"""Peak memory of hypergradients, against that of a plain training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mlo
from mlo.bench.experiments.measured import described, refusal
from mlo.bench.experiments.overhead import state_bytes
from mlo.bench.experiments.settings import DTYPES, Settings, Task
from mlo.bench.libraries.by_hand import LeanLoop
from mlo.bench.libraries.ours import StageProblem, optimizer_of
from mlo.bench.measure.clock import Seconds, timed
from mlo.bench.measure.memory import peak_bytes
from mlo.bench.problems.family import vector_module
from mlo.bench.records import Record
from mlo.bench.specification import Method
from mlo.bench.stage import Case, Stage, View

NAME = "memory"
SUMMARY = "peak memory of hypergradients against a training step, and of an unrolled solve of 400 steps"

_CASES = (("reweighting", "random-decay"), ("supernet", "small"))
# (That a solve keeps one graph, however long it is, shows in cg:5 and cg:20 alike.)
_METHODS = ("fd", "identity", "cg:5", "cg:20", "neumann:5")
_QUICK_METHODS = ("fd", "cg:5")
# Calls before the one that is looked at: caches fill, and checks that are made at first are over.
_CALLS_BEFORE = 2

_STEPS, _QUICK_STEPS = 400, 50


def tasks(settings: Settings) -> list[Task]:
    """Return a task for each case and method, and those of the unrolled solve."""
    found = []
    dtype = settings.dtype or "float32"
    for problem, size in _CASES[: 1 if settings.quick else None]:
        if size not in settings.chosen_sizes(problem, (size,)):
            continue
        head = {"experiment": NAME, "problem": problem, "size": size, "seed": settings.seeds[0], "dtype": dtype}
        case = partial(settings.case, problem, size, settings.seeds[0], dtype)
        found.append(Task({**head, "method": "training step"}, partial(_training_step, settings, case)))
        found += [
            Task({**head, "method": str(m), "budget": m.budget}, partial(_hypergradients, settings, case, m))
            for m in settings.chosen_methods(_QUICK_METHODS if settings.quick else _METHODS)
        ]
    if settings.methods is None and settings.sizes is None:
        steps = _QUICK_STEPS if settings.quick else _STEPS
        head = {"experiment": NAME, "problem": "unrolled", "size": f"{steps}-steps", "seed": 0, "dtype": dtype}
        found.append(Task({**head, "method": f"unroll:{steps}", "budget": steps}, partial(_unrolled, settings, steps)))
    return found


def _training_step(settings: Settings, build: Callable[[], Case]) -> Iterator[Record]:
    """Measure one training step of the lower stages by hand: forward pass, reverse pass, optimizer."""
    case = build()
    loop = LeanLoop(case, Method("fd"))
    for _ in range(2):
        loop.descend()
    peak = peak_bytes(loop.descend, settings.device)
    yield {"library": "by-hand", "version": torch.__version__, "memory_bytes": peak, "state_bytes": state_bytes(case)}


def _hypergradients(settings: Settings, build: Callable[[], Case], method: Method) -> Iterator[Record]:
    case = build()
    able = {library.name: library for library in settings.libraries if refusal(library, case, method) is None}
    able = {name: library for name, library in able.items() if library.countable}
    for name, library in able.items():
        record: Record = {"library": name, "version": library.version(), "state_bytes": state_bytes(case)}
        try:
            record["memory_bytes"] = _peak(library.hypergradient(case, method), settings.device)
        except Exception as error:  # a peer may fail in any way
            record["failure"] = described(error)
        yield record


def _peak(call: Callable[[], object], device: torch.device) -> int | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(_CALLS_BEFORE):
            call()
        return peak_bytes(call, device)


# --- an unrolled solve ------------------------------------------------------------------------------------------


def _train(own: View, others: Mapping[str, View], batch: Any) -> Tensor:
    target: Tensor = others["upper"].params["target"]
    output: Tensor = own(batch)
    return (output - target).square().mean()


def _validate(_: View, others: Mapping[str, View], batch: Any) -> Tensor:
    output: Tensor = others["stage"](batch)
    return output.square().mean()


def _unrolled(settings: Settings, steps: int) -> Iterator[Record]:
    """Measure a step over a solve of that many steps, with what is kept of it before each, or before some of them."""
    for variant, keep_every in (("keep_every=1", 1), ("keep_every=None", None)):
        engine = _engine(settings, steps, mlo.Unroll(keep_every=keep_every))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds = [timed(engine.step, settings.device)]
            peak = peak_bytes(engine.step, settings.device)
        modules = [p.module for p in engine.problems.values()]
        yield {
            "library": "mlo",
            "version": mlo.__version__,
            "variant": variant,
            "seconds": Seconds.of(seconds).as_record(),
            "memory_bytes": peak,
            "state_bytes": sum(t.numel() * t.element_size() for m in modules for t in m.parameters()),
        }


def _engine(settings: Settings, steps: int, method: mlo.HypergradientMethod) -> mlo.Engine:
    """Return a net of 263,425 weights that takes `steps` steps under one number."""
    dtype, device = DTYPES[settings.dtype or "float32"], settings.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 256, generator=generator).to(device, dtype)

    def net() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = (nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1))
            return nn.Sequential(*layers).to(device, dtype)

    stage = Stage("stage", net, _train, ("upper",), batches=(x,), learning_rate=1e-3)
    build: Callable[[], nn.Module] = vector_module(target=torch.ones(1, dtype=dtype, device=device))
    upper = Stage("upper", build, _validate, ("stage",), batches=(x,), learning_rate=0.1)
    problems = []
    described: tuple[tuple[Stage, dict[str, Any]], ...] = (
        (stage, {"steps": steps, "hypergradient": method}),
        (upper, {}),
    )
    for s, options in described:
        module = s.module()
        problems.append(StageProblem(s, module, s.batches, optimizer=optimizer_of(s, module.parameters()), **options))
    return mlo.Engine(problems)
