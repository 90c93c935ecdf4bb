"""`mlo` itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mlo
from mlo.bench.libraries.base import Library, Training
from mlo.bench.specification import NYSTROM_DAMPING, SHIFT, Method
from mlo.bench.stage import Case, Gradient, Stage
from mlo.compiled_loss import missing_support
from mlo.traced_pullback import MOST_STEPS

# An engine whose upper problem warms up for ever trains the stages alone.
_FOR_EVER = 10**9

# What `compile=True` is for, and the calls in which everything is compiled: every other one of the first is a check.
_COMPILED = ("fd", "identity", "cg", "neumann")
_UNTIL_COMPILED = 6


class StageProblem(mlo.Problem):
    """A stage as a problem of an engine: the problem and its dependencies are the views."""

    def __init__(self, stage: Stage, module: nn.Module, batches: Sequence[Any], **options: Any) -> None:
        """Keep the stage's loss."""
        super().__init__(stage.name, module, data=list(batches), depends_on=stage.reads, **options)
        self._loss, self._reads = stage.loss, stage.reads
        self._others: dict[str, Any] = {}

    def training_step(self, batch: Any) -> Tensor:
        """Return the stage's loss."""
        if not self._others:  # looked up once, as the views of the other libraries are
            self._others = {name: self.deps[name] for name in self._reads}
        return self._loss(self, self._others, batch)


def optimizer_of(stage: Stage, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the stage's optimizer."""
    if stage.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=stage.learning_rate)
    return torch.optim.SGD(parameters, lr=stage.learning_rate, momentum=stage.momentum)


def method_of(method: Method, stage: Stage) -> mlo.HypergradientMethod:
    """Return what `mlo` calls it."""
    budget, scale = method.budget or 1, stage.factor
    methods: dict[str, Callable[[], mlo.HypergradientMethod]] = {
        "fd": lambda: mlo.FiniteDifference(scale=scale, epsilon=SHIFT),
        "identity": lambda: mlo.Identity(scale=scale),
        "neumann": lambda: mlo.Neumann(terms=budget, scale=scale, rtol=0),
        "cg": lambda: mlo.ConjugateGradient(max_steps=budget, rtol=0),
        "gmres": lambda: mlo.GMRES(max_steps=budget, rtol=0),
        "minres": lambda: mlo.MINRES(max_steps=budget, rtol=0),
        "nystrom": lambda: mlo.Nystrom(rank=budget, damping=NYSTROM_DAMPING / scale),
        "unroll": lambda: mlo.Unroll(steps=budget, keep_every=1),
        "dense": lambda: mlo.Dense(max_size=10_000),
    }
    return methods[method.kind]()


class Ours(Library):
    """`mlo.Engine`."""

    name = "mlo"
    #: Whether losses and gradients are compiled.
    compiled = False

    def version(self) -> str:
        """Return the version of `mlo`."""
        return mlo.__version__

    def refuses(self, case: Case, method: Method) -> str | None:
        """Return what the graph's checks say."""
        try:
            self._engine(case, method, training=False)
        except (mlo.GraphError, mlo.ConfigurationError) as error:
            return str(error)
        return None

    def hypergradient(self, case: Case, method: Method) -> Callable[[], Gradient]:
        """Return `engine.hypergradient` at the solutions."""
        engine = self._engine(case, method, training=False)
        upper = case.upper.name
        if method.kind != "unroll":
            return lambda: engine.hypergradient(upper)
        beginning = {stage.name: _values(stage.beginning()) for stage in case.lower}

        def unrolled() -> Gradient:
            with torch.no_grad():
                for name, values in beginning.items():
                    for parameter, value in zip(engine.problems[name].module.parameters(), values, strict=True):
                        parameter.copy_(value)
            engine.step()
            return engine.hypergradient(upper)

        return unrolled

    def training(self, case: Case, method: Method) -> Training:
        """Return the engine's own loop."""
        return _EngineTraining(self._engine(case, method, training=True), case)

    def _engine(self, case: Case, method: Method, *, training: bool) -> mlo.Engine:
        problems = []
        for stage in case.stages:
            module = stage.beginning() if training else stage.module()
            options: dict[str, Any] = {"steps": stage.steps if training else 1, "compile": self.compiled}
            if training:
                options["optimizer"] = optimizer_of(stage, module.parameters())
            elif method.kind == "unroll" and stage is not case.upper:
                options["optimizer"] = torch.optim.SGD(module.parameters(), lr=stage.factor)
                options["steps"] = method.budget
            if stage is not case.upper:
                options["hypergradient"] = method_of(method, stage)
            elif not training:
                options["warmup"] = _FOR_EVER
            # As many as are drawn for one hypergradient, so that the next one begins with the first again.
            drawn = method.budget or 1 if method.kind == "unroll" and stage is not case.upper else 1
            batches = stage.batches if training else [stage.batches[i % len(stage.batches)] for i in range(drawn)]
            problems.append(StageProblem(stage, module, batches, **options))
        return mlo.Engine(problems)


class OursCompiled(Ours):
    """`mlo.Engine` over problems with `compile=True`. Compiling is no part of the time."""

    name = "mlo-compiled"
    passes_countable = False
    compiled = True

    def unavailable(self) -> str | None:
        """Return what torch lacks."""
        missing = missing_support()
        return None if missing is None else f"expected {missing}; pip install --upgrade torch"

    def refuses(self, case: Case, method: Method) -> str | None:
        """Return what it lacks."""
        if method.kind not in _COMPILED or (method.budget or 0) > MOST_STEPS:
            return f"only {', '.join(_COMPILED)} are compiled, with up to {MOST_STEPS} steps; others are those of mlo"
        return super().refuses(case, method)

    def hypergradient(self, case: Case, method: Method) -> Callable[[], Gradient]:
        """Return `engine.hypergradient` at the solutions, compiled."""
        engine = self._engine(case, method, training=False)
        for _ in range(_UNTIL_COMPILED):
            engine.hypergradient(case.upper.name)
        _reject_uncompiled(engine)
        return lambda: engine.hypergradient(case.upper.name)

    def training(self, case: Case, method: Method) -> Training:
        """Return the engine's own loop, compiled."""
        return _CompiledTraining(self._engine(case, method, training=True), case)


def _reject_uncompiled(engine: mlo.Engine) -> None:
    """Raise an error where what is called compiled is not: the engine goes on with it as it is."""
    for member in engine._members.values():
        assert member.compiled is not None, member.name
        if member.compiled.failure is not None:
            raise RuntimeError(member.compiled.failure)


class _EngineTraining(Training):
    def __init__(self, engine: mlo.Engine, case: Case) -> None:
        self.engine, self._case = engine, case

    def step(self) -> None:
        self.engine.step()

    def metric(self) -> float:
        return self._case.metric({name: p.module for name, p in self.engine.problems.items()})


class _CompiledTraining(_EngineTraining):
    def step(self) -> None:
        super().step()
        _reject_uncompiled(self.engine)


def _values(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]
