"""Betty: whole graphs of problems, a hypergradient as the sum over all paths."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mlo.bench.libraries.base import Training
from mlo.bench.libraries.peer import Peer, load
from mlo.bench.specification import SHIFT, Method
from mlo.bench.stage import Case, Gradient, ModuleView, Stage, View

_TYPES = {"fd": "darts", "identity": "neumann", "neumann": "neumann", "cg": "cg"}


class Betty(Peer):
    """`betty.engine.Engine` over one `ImplicitProblem` for each stage.

    Betty's "darts" takes H⁻¹ for the identity. A stage's factor enters as a factor of its loss, with which it gives
    the same as the other libraries; plain SGD then gets the learning rate divided by it. Its "cg" is used with
    cg_alpha = 1; the release on PyPI makes each direction from the residual of the step before, so that it does not
    converge. Its "darts" moves the weights themselves there and back, so they drift by rounding from call to call.
    """

    name = "betty"
    module = "betty.engine"
    distribution = "betty-ml"
    install = "pip install --no-deps --ignore-requires-python betty-ml==0.2.1"
    kinds = tuple(_TYPES)
    graphs = True

    def refuses(self, case: Case, method: Method) -> str | None:
        """Return what it lacks."""
        if method.kind == "unroll":
            return "betty's IterativeProblem reads an attribute that its Problem no longer has (_fp16)"
        if method.kind != "fd" and case.nested:
            return f'betty\'s "{_TYPES.get(method.kind, method.kind)}" asserts that a stage is above no other'
        return super().refuses(case, method)

    def hypergradient(self, case: Case, method: Method) -> Callable[[], Gradient]:
        """Return a descent step of the upper problem that keeps the gradient instead of stepping."""
        _, problems = _built(case, method, {stage.name: stage.module() for stage in case.stages})
        upper = problems[case.upper.name]
        found: list[Tensor] = []

        def keep() -> None:
            found[:] = [torch.zeros_like(p) if p.grad is None else p.grad for p in upper.trainable_parameters()]

        upper.custom_optimizer_step = keep  # where Betty looks for a step other than the optimizer's
        batches = {name: problem.get_batch() for name, problem in problems.items()}
        names = [name for name, _ in upper.module.named_parameters()]

        def computed() -> Gradient:
            for name, problem in problems.items():
                problem.cur_batch = batches[name]
            upper.one_step_descent(batches[case.upper.name])
            return dict(zip(names, found, strict=True))

        return computed

    def training(self, case: Case, method: Method) -> Training | None:
        """Return its engine's loop, where that is the same as the stages' steps."""
        if _other_schedule(case):
            return None
        return _BettyTraining(case, method)


class _BettyTraining(Training):
    def __init__(self, case: Case, method: Method) -> None:
        self._case = case
        self._modules = {stage.name: stage.beginning() for stage in case.stages}
        self._engine, problems = _built(case, method, self._modules)
        self._upper = problems[case.upper.name]

    def step(self) -> None:
        """Step as `Engine.run` does until the upper problem has: Betty steps the lowest, and calls the others then."""
        before = self._upper.count
        while self._upper.count == before:
            self._engine.global_step += 1
            self._engine.train_step()

    def metric(self) -> float:
        return self._case.metric(self._modules)


def _other_schedule(case: Case) -> bool:
    """Return whether Betty would make other steps.

    It repeats the steps below a stage for each step of the stage, which is right for nested stages only, and steps
    all of the lowest stages as often as one another.
    """
    lowest = {stage.steps for stage in case.lower if not _earlier(case, stage)}
    repeated = any(stage.steps > 1 and _earlier(case, stage) for stage in case.lower)
    return len(lowest) > 1 or (repeated and not case.nested)


def _earlier(case: Case, stage: Stage) -> list[str]:
    """Return the stages before `stage` that it reads."""
    before = [s.name for s in case.stages[: case.stages.index(stage)]]
    return [name for name in stage.reads if name in before]


def _built(case: Case, method: Method, modules: dict[str, nn.Module]) -> tuple[Any, dict[str, Any]]:
    """Return Betty's engine, and its problems by the names of the stages."""
    betty, configs, logger_base = load("betty.engine"), load("betty.configs"), load("betty.logging.logger_base")
    implicit_problem: Any = load("betty.problems").ImplicitProblem
    logger_base.get_logger().setLevel(logging.ERROR)  # it prints to the standard output

    views: dict[str, View] = {name: ModuleView(module) for name, module in modules.items()}

    class StageProblem(implicit_problem):  # type: ignore[misc]
        """A stage; its batches are not taken apart as Betty's loader would."""

        def __init__(self, stage: Stage) -> None:
            scale = stage.factor if method.kind == "fd" and stage is not case.upper else None
            super().__init__(
                f"stage_{stage.name}",  # a name becomes an attribute of all problems
                configs.Config(
                    type=_TYPES[method.kind],
                    unroll_steps=stage.steps,
                    retain_graph=any(stage.name in s.reads for s in case.stages[: case.stages.index(stage)]),
                    darts_alpha=SHIFT,
                    neumann_iterations=(method.budget or 1) - 1,  # the first term is not counted
                    neumann_alpha=stage.factor,
                    cg_iterations=method.budget or 1,
                ),
                module=modules[stage.name],
                optimizer=_optimizer(stage, modules[stage.name], scale or 1.0),
            )
            self._stage, self._scale, self._next = stage, scale, 0
            self._views = {name: views[name] for name in stage.reads}

        def get_batch(self) -> tuple[Any]:
            batch = self._stage.batches[self._next % len(self._stage.batches)]
            self._next += 1
            return (batch,)

        def training_step(self, batch: tuple[Any]) -> Tensor:
            loss = self._stage.loss(views[self._stage.name], self._views, batch[0])
            return loss if self._scale is None else self._scale * loss

    problems = {stage.name: StageProblem(stage) for stage in case.stages}
    up: dict[Any, list[Any]] = {}
    down: dict[Any, list[Any]] = {}
    for stage in case.stages:
        earlier = _earlier(case, stage)
        for name in earlier:
            up.setdefault(problems[name], []).append(problems[stage.name])
        for name in stage.reads:
            if name not in earlier:
                down.setdefault(problems[name], []).append(problems[stage.name])
    device = next(modules[case.upper.name].parameters()).device.type
    config = configs.EngineConfig(strategy="gpu" if device == "cuda" else "cpu")
    engine = betty.Engine(list(problems.values()), config=config, dependencies={"u2l": down, "l2u": up})
    engine.train()
    return engine, problems


def _optimizer(stage: Stage, module: nn.Module, scale: float) -> torch.optim.Optimizer:
    """Return the stage's optimizer for its loss times `scale`."""
    if stage.optimizer == "adam":
        return torch.optim.Adam(module.parameters(), lr=stage.learning_rate)
    return torch.optim.SGD(module.parameters(), lr=stage.learning_rate / scale, momentum=stage.momentum)
