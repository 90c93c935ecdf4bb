"""Whether a method leaves everything as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlo.engine import Engine
from mlo.errors import BreakdownError
from mlo.hypergradient import HypergradientMethod, StopGradient
from mlo.problem import Problem
from mlo.testing.level import LEARNING_RATE
from mlo.testing.probe import STEPS, Probe
from mlo.testing.watched import watched


class _Network(Problem):
    """A stage with dropout and batch norm, whose loss draws random numbers and moves buffers."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        penalty = self.deps.upper.params["log"].exp()
        squares = torch.stack([p.square().sum() for p in self.params.values()]).sum()
        loss: Tensor = (self(x) - y).square().mean() + penalty * squares
        return loss


class _Validation(Problem):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss: Tensor = (self.deps.net(x) - y).square().mean() + 1e-3 * self.params["log"].square()
        return loss


def _network(probe: Probe, method: HypergradientMethod, steps: int) -> Engine:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)).to(probe.dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.5 * probe.normal(*p.shape))
    upper = nn.ParameterDict({"log": torch.zeros((), dtype=probe.dtype)})
    data = [(probe.normal(8, 3).to(probe.dtype), probe.normal(8, 1).to(probe.dtype)) for _ in range(2)]
    stage = _Network(
        "net",
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9),
        data=data,
        depends_on=["upper"],
        hypergradient=method,
        steps=steps,
    )
    top = _Validation(
        "upper", upper, optimizer=torch.optim.SGD(upper.parameters(), lr=LEARNING_RATE), data=data, depends_on=["net"]
    )
    return Engine([stage, top])


def changed_by_a_hypergradient(probe: Probe) -> str:
    """Return which parameters, buffers, `.grad`, optimizers, modes or generators a hypergradient changes: none."""
    method, _ = watched(probe.method)
    engine = _network(probe, method, STEPS)
    engine.step()
    for problem in engine.problems.values():
        for p in problem.module.parameters():
            p.grad = None
    before = _everything(engine)
    with suppress(BreakdownError):
        engine.hypergradient("upper")
    changed = [what for what, value in _everything(engine).items() if not _same(value, before[what])]
    return f"changed: {', '.join(changed)}" if changed else ""


def changed_by_a_step(probe: Probe) -> str:
    """Return what a method changes in a step of the engine beside what it is asked for: nothing."""
    method, _ = watched(probe.method)
    levels = probe.solved(probe.a)
    engines = [probe.engine(levels, m, steps=STEPS) for m in (method, StopGradient())]
    before = _generators()
    for engine in engines:
        engine.step()
        if not _same(_generators(), before):
            return "draws random numbers"
    one, other = (engine.problems["w"].module.state_dict() for engine in engines)
    return "" if _same(one, other) else "changes the stage's parameters"


def _everything(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = {"random state": _generators()}
    for name, problem in engine.problems.items():
        module, optimizer = problem.module, problem.optimizer
        for n, p in module.named_parameters():
            found[f"parameter {n} of {name}"] = p.detach().clone()
            found[f".grad of {n} of {name}"] = None if p.grad is None else p.grad.clone()
        for n, b in module.named_buffers():
            found[f"buffer {n} of {name}"] = b.clone()
        found[f"training mode of {name}"] = [part.training for part in module.modules()]
        found[f"optimizer of {name}"] = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    return found


def _generators() -> list[Any]:
    kind, key, *rest = np.random.get_state()
    return [torch.get_rng_state(), random.getstate(), kind, key, *rest]


def _same(a: Any, b: Any) -> bool:
    """Whether two nested structures of tensors and arrays hold the same bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
