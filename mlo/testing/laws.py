"""Laws that every method must keep, whether its solves converge or not.

Each is tried on a small probe: a stage with six numbers under an upper problem whose loss is a·θ*(x), so that the
gradient in x is the method's answer −Gᵀ H⁻ᵀ a and nothing else.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlo.engine import Engine
from mlo.errors import BreakdownError, ConfigurationError, MloWarning
from mlo.hypergradient import HypergradientMethod, StopGradient
from mlo.problem import Problem
from mlo.testing.level import LEARNING_RATE, WHOLE, Layout, Level, Numbers, OptimizerFactory, engine_of, with_gradient
from mlo.testing.outcomes import LawResult
from mlo.testing.reference import condition, solved_in_order
from mlo.testing.watched import Watch, damping_of, watched

Vectors = Mapping[str, Tensor]

_SIZE = 6
_READ = 4
#: How many steps a stage takes for methods that differentiate through steps.
STEPS = 3


class Probe:
    """Runs one method on variants of one small problem."""

    def __init__(self, method: HypergradientMethod, dtype: torch.dtype) -> None:
        """Draw the problem's data from a generator of its own."""
        self.method, self.dtype = method, dtype
        self._generator = torch.Generator().manual_seed(0)
        q = torch.linalg.qr(self.normal(_SIZE, _SIZE)).Q
        self.hessian = q @ torch.diag(torch.linspace(1.0, 5.0, _SIZE, dtype=torch.float64)) @ q.T
        self.coupling = torch.cat([self.normal(_SIZE, _READ), torch.zeros(_SIZE, 1, dtype=torch.float64)], dim=1)
        self.offset = self.normal(_SIZE)
        self.point = self.normal(_READ + 1)
        self.a, self.b = self.normal(_SIZE), self.normal(_SIZE)
        self._stage = solved_in_order([self.stage(), self.upper(self.a)])[0]
        self._condition = condition([self._stage, self.upper(self.a)])

    def normal(self, *shape: int) -> Tensor:
        """Return random numbers in float64."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    @property
    def tolerance(self) -> float:
        """How much two answers may differ that are equal but for rounding."""
        return same_answer(self.dtype)

    def stage(self, *, hessian: Tensor | None = None, curved: bool = True) -> Level:
        """Return the stage ½θᵀAθ + Σ cosh(θ/2) − θᵀ(b + Bx)."""
        constants = {"A": self.hessian if hessian is None else hessian, "B": self.coupling, "b": self.offset}
        start = torch.zeros(_SIZE, dtype=torch.float64)
        return Level("w", ("top",), _curved_stage if curved else _stage, start, constants)

    def upper(self, a: Tensor, loss: Callable[[Tensor, Vectors, Vectors], Tensor] | None = None) -> Level:
        """Return the upper problem a·θ, with a term in its last number alone, so that it has a gradient anyway."""
        return Level("top", ("w",), loss or _linear, self.point, {"a": a})

    def solved(self, a: Tensor, stage: Level | None = None) -> list[Level]:
        """Return both levels, the stage (by default the usual one) at its solution."""
        upper = self.upper(a)
        return [self._stage, upper] if stage is None else solved_in_order([stage, upper])

    def engine(self, levels: Sequence[Level], method: HypergradientMethod, **options: Any) -> Engine:
        """Return an engine at the solution."""
        return engine_of(levels, method, dtype=self.dtype, **{"layouts": {"w": WHOLE, "top": WHOLE}, **options})

    def answer(self, levels: Sequence[Level], **options: Any) -> tuple[Tensor, Watch]:
        """Return the method's answer in float64, and how it was found."""
        method, watch = watched(self.method)
        engine = ready(lambda steps: self.engine(levels, method, steps=steps, **options), method)
        watch.reports.clear()
        watch.residuals.clear()
        found = engine.hypergradient("top")["piece_0"]
        return found[:_READ].double(), watch

    def differs(self, found: Tensor, expected: Tensor, watches: Sequence[Watch] = ()) -> str:
        """Return how two answers differ, or nothing if they are equal up to rounding and what solves leave over."""
        residual = max((w.worst_residual for w in watches if w.converged), default=0.0)
        left_over = 100 * self._condition * residual
        size = max(expected.norm().item(), found.norm().item())
        error = (found - expected).norm().item() / size if size else 0.0
        if error <= max(self.tolerance, left_over):
            return ""
        return f"relative difference {error:.1e}" if torch.isfinite(found).all() else "not finite"


def same_answer(dtype: torch.dtype) -> float:
    """Return how much two answers may differ that are equal but for rounding, central differences allowed for."""
    return min(10 * math.sqrt(torch.finfo(dtype).eps), 0.3)


def ready(build: Callable[[int], Engine], method: HypergradientMethod) -> Engine:
    """Return an engine of which `method` can give a hypergradient.

    One that differentiates through steps needs some: the stages take them at their solutions, where they stay.
    """
    if not method.recorded_steps(STEPS):
        return build(1)
    engine = build(STEPS)
    upper = engine.problems[engine.graph.names[-1]]
    upper.warmup = 1
    with quiet():
        engine.step()
    return engine


@contextmanager
def quiet() -> Iterator[None]:
    """Let the library's warnings pass, since a report tells what matters, and warnings may be errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MloWarning)
        yield


def _stage(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    return 0.5 * own @ c["A"] @ own - own @ (c["b"] + c["B"] @ others["top"])


def _curved_stage(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    return _stage(own, others, c) + torch.cosh(0.5 * own).sum()


def _linear(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    return 0.5 * own[-1].square() + c["a"] @ others["w"]


# --- the laws --------------------------------------------------------------------------------------------------

Law = Callable[[Probe], LawResult]


def _result(law: str, broken: str) -> LawResult:
    return LawResult(law, "BROKEN" if broken else "ok", broken)


def same_twice(probe: Probe) -> LawResult:
    """The same question has the same answer, on one engine and on a new one."""
    method, _ = watched(probe.method)
    levels = probe.solved(probe.a)
    engine = ready(lambda steps: probe.engine(levels, method, steps=steps), method)
    first, second = (engine.hypergradient("top")["piece_0"] for _ in range(2))
    fresh, _ = probe.answer(levels)
    eps = 1e3 * torch.finfo(probe.dtype).eps
    if not torch.allclose(first, second, rtol=eps, atol=0, equal_nan=True):
        return _result("same twice", f"two calls differ by {(first - second).abs().max().item():.1e}")
    same = torch.allclose(first[:_READ].double(), fresh, rtol=eps, atol=0, equal_nan=True)
    return _result("same twice", "" if same else "a new engine at the same point gives another answer")


def homogeneous(probe: Probe) -> LawResult:
    """The answer to s·a is s times the answer to a."""
    base, first = probe.answer(probe.solved(probe.a))
    for s in (-3.0, 1e-6, 1e6):
        found, second = probe.answer(probe.solved(s * probe.a))
        difference = probe.differs(found / s, base, [first, second])
        if difference:
            return _result("homogeneous", f"{s:g}·a: {difference}")
    return _result("homogeneous", "")


def additive(probe: Probe) -> LawResult:
    """The answer to a + b is the sum of both answers; not for solves that stop early, which need not be linear."""
    answers = [probe.answer(probe.solved(v)) for v in (probe.a, probe.b, probe.a + probe.b)]
    statuses = {s.name for _, watch in answers for s in watch.statuses}
    if not statuses <= {"CONVERGED", "APPROXIMATE"}:
        return LawResult("additive", "left out", f"solves end with {', '.join(sorted(statuses))}")
    (first, second, both), watches = [x for x, _ in answers], [w for _, w in answers]
    return _result("additive", probe.differs(both, first + second, watches))


def zero(probe: Probe) -> LawResult:
    """The answer to 0 is 0."""
    found, _ = probe.answer(probe.solved(0 * probe.a))
    return _result(
        "zero", "" if not found.any() else f"the answer to 0 has entries up to {found.abs().max().item():.1e}"
    )


def permutation(probe: Probe) -> LawResult:
    """The order of the parameters does not matter."""
    return _same_for_layouts(
        probe, "permutation", Layout(((), (2, 1), None)), Layout(((), (2, 1), None), order=(2, 0, 1))
    )


def splitting(probe: Probe) -> LawResult:
    """One vector, a mixture of shapes and six 0-dim tensors give the same."""
    return _same_for_layouts(probe, "splitting", WHOLE, Layout(((), (2, 1), None)), Layout(((),) * _SIZE))


def unused(probe: Probe) -> LawResult:
    """Parameters that no loss reads, frozen or not, change nothing."""
    return _same_for_layouts(probe, "unused parameters", WHOLE, Layout(extras=True))


def _same_for_layouts(probe: Probe, law: str, first: Layout, *others: Layout) -> LawResult:
    levels = probe.solved(probe.a)
    expected, watch = probe.answer(levels, layouts={"w": first, "top": WHOLE})
    for layout in others:
        found, second = probe.answer(levels, layouts={"w": layout, "top": WHOLE})
        difference = probe.differs(found, expected, [watch, second])
        if difference:
            return _result(law, difference)
    return _result(law, "")


def frozen(probe: Probe) -> LawResult:
    """A frozen parameter is a constant of the loss."""
    levels = probe.solved(probe.a)
    found, first = probe.answer(levels, layouts={"w": Layout(((2,), None), frozen=(0,)), "top": WHOLE})
    stage, top = levels
    constant = stage.start[:2]

    def reduced(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
        return stage.loss(torch.cat([constant.to(own.dtype), own]), others, c)

    def upper(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
        return top.loss(own, {"w": torch.cat([constant.to(own.dtype), others["w"]])}, c)

    smaller = [replace(stage, loss=reduced, start=stage.start[2:]), replace(top, loss=upper)]
    expected, second = probe.answer(smaller)
    return _result("frozen parameters", probe.differs(found, expected, [first, second]))


def identity(probe: Probe) -> LawResult:
    """For H = c·I the answer does not point away from the exact one, and is exact where 1/c is the method's scale."""
    scale = _scale(probe.method)
    for c in (1e-3, 1.0, 1e3) if scale is None else (1e-3, 1.0, 1e3, 1 / scale):
        stage = probe.stage(hessian=c * torch.eye(_SIZE, dtype=torch.float64), curved=False)
        found, watch = probe.answer(probe.solved(probe.a, stage))
        exact = probe.coupling[:, :_READ].T @ probe.a / c
        if watch.broken:
            continue
        if scale is not None and c == 1 / scale and not damping_of(probe.method):
            difference = probe.differs(found, exact, [watch])
            if difference:
                return _result("H = c·I", f"c = {c:g}, the inverse of the scale: {difference}")
        if not torch.dot(found, exact) >= -probe.tolerance * exact.norm() * found.norm():
            return _result("H = c·I", f"c = {c:g}: the answer points away from the exact one")
    return _result("H = c·I", "")


def parameter_groups(probe: Probe) -> LawResult:
    """Each parameter has the learning rate of its own group, whatever the order of the groups."""
    if not probe.method.needs_learning_rate:
        return LawResult("parameter groups", "left out", "the method takes no learning rate")
    rates = torch.tensor([0.5, 0.5, 0.02, 0.02, 0.02, 0.02], dtype=torch.float64)
    stage = probe.stage(hessian=torch.diag(1 / rates), curved=False)
    layout = Layout(((2,), None))

    def groups(module: Numbers) -> torch.optim.Optimizer:
        first, second = module.piece_0, module.piece_1
        return torch.optim.SGD([{"params": [second], "lr": 0.02}, {"params": [first], "lr": 0.5}], lr=1.0)

    optimizers: dict[str, OptimizerFactory] = {"w": groups}
    found, watch = probe.answer(
        probe.solved(probe.a, stage), layouts={"w": layout, "top": WHOLE}, optimizers=optimizers
    )
    exact = probe.coupling[:, :_READ].T @ (rates * probe.a)
    return _result("parameter groups", probe.differs(found, exact, [watch]))


def weight_decay(probe: Probe) -> LawResult:
    """An L2 decay of the optimizer is the same as the penalty in the loss."""
    inside = probe.stage(hessian=probe.hessian + 0.5 * torch.eye(_SIZE, dtype=torch.float64))
    expected, first = probe.answer(probe.solved(probe.a, inside))
    found, second = probe.answer(probe.solved(probe.a, replace(probe.stage(), decay=0.5)))
    return _result("weight decay", probe.differs(found, expected, [first, second]))


def maximise(probe: Probe) -> LawResult:
    """Maximising −L is the same as minimising L."""
    stage, upper = probe.solved(probe.a)
    expected, first = probe.answer([stage, upper])
    negative = replace(stage, loss=lambda own, others, c: -stage.loss(own, others, c), maximise=True)
    found, second = probe.answer([negative, upper])
    return _result("maximise", probe.differs(found, expected, [first, second]))


def honest_residual(probe: Probe) -> LawResult:
    """A solve that says that it converged has no larger residual than it reports."""
    _, watch = probe.answer(probe.solved(probe.a))
    if not watch.residuals:
        return LawResult("honest residual", "left out", "no solve reports that it converged")
    for reported, true in watch.residuals:
        if not true <= 2 * reported + probe.tolerance:
            return _result(
                "honest residual", f"CONVERGED with a residual of {reported:.1e} reported and {true:.1e} true"
            )
    return _result("honest residual", "")


def singular(probe: Probe) -> LawResult:
    """A system without solution is not reported as solved."""
    # Singular in every precision.
    eigenvalues = torch.tensor([0.0, 1, 2, 3, 4, 5], dtype=torch.float64)
    stage = probe.stage(hessian=torch.diag(eigenvalues), curved=False)
    if damping_of(probe.method):
        return LawResult("singular", "left out", "the method's damping makes the system regular")
    _, watch = probe.answer([stage, probe.upper(probe.a)])
    return _result("singular", "CONVERGED at a singular Hessian" if watch.converged else "")


def not_finite(probe: Probe) -> LawResult:
    """A cotangent of NaN is not reported as solved."""

    def spoilt(own: Tensor, others: Vectors, _: Vectors) -> Tensor:
        w = others["w"]
        return 0.5 * own[-1].square() + with_gradient(w, torch.full_like(w, torch.nan))

    stage, _ = probe.solved(probe.a)
    try:
        _, watch = probe.answer([stage, probe.upper(probe.a, spoilt)])
    except BreakdownError:
        return _result("not finite", "")
    return _result("not finite", "CONVERGED for a cotangent of NaN" if watch.converged else "")


def warm_start(probe: Probe) -> LawResult:
    """Where a solve begins does not change what it converges to."""
    if not probe.method.keeps_solutions:
        return LawResult("warm start", "left out", "the method keeps no solutions")
    method, watch = watched(probe.method)
    levels = probe.solved(probe.a)
    engine = probe.engine(levels, method)
    for _ in range(3):
        engine.step()
    cold = probe.engine(levels, method)
    for name, problem in cold.problems.items():
        problem.module.load_state_dict(engine.problems[name].module.state_dict())
    watch.reports.clear()
    found, expected = (e.hypergradient("top")["piece_0"].double() for e in (engine, cold))
    if not watch.converged:
        return LawResult("warm start", "left out", "solves do not converge")
    return _result("warm start", probe.differs(found, expected, [watch]))


# --- leaving everything as it was ------------------------------------------------------------------------------


class _Network(Problem):
    """A stage with dropout and batch norm, whose loss draws random numbers and moves buffers."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        penalty = self.deps.upper.params["log"].exp()
        return (self(x) - y).square().mean() + penalty * sum(p.square().sum() for p in self.params.values())  # type: ignore[no-any-return]


class _Validation(Problem):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self.deps.net(x) - y).square().mean() + 1e-3 * self.params["log"].square()  # type: ignore[no-any-return]


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


def leaves_all_as_it_was(probe: Probe) -> LawResult:
    """A hypergradient changes no parameter, buffer, `.grad`, optimizer, training mode or random state."""
    law = "changes nothing"
    method, _ = watched(probe.method)
    state = torch.get_rng_state()
    try:
        engine = _network(probe, method, STEPS)
        engine.step()
        for problem in engine.problems.values():
            for p in problem.module.parameters():
                p.grad = None
        before = _everything(engine)
        with suppress(BreakdownError):
            engine.hypergradient("upper")
        changed = [what for what, value in _everything(engine).items() if not _same(value, before[what])]
    finally:
        torch.set_rng_state(state)
    return _result(law, f"changed: {', '.join(changed)}" if changed else "")


def steps_alone(probe: Probe) -> LawResult:
    """In a step of the engine a method touches neither the stage's parameters nor the random generators."""
    method, _ = watched(probe.method)
    levels = probe.solved(probe.a)
    engines = [probe.engine(levels, m, steps=STEPS) for m in (method, StopGradient())]
    before = _generators()
    for engine in engines:
        engine.step()
        if not _same(_generators(), before):
            return _result("leaves steps alone", "draws random numbers")
    one, other = (engine.problems["w"].module.state_dict() for engine in engines)
    return _result("leaves steps alone", "" if _same(one, other) else "changes the stage's parameters")


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


def _scale(method: HypergradientMethod) -> float | None:
    """Return the number that a method takes for the inverse of the curvature, if it has one."""
    if method.needs_learning_rate:
        return LEARNING_RATE
    scale = getattr(method, "scale", None)
    return float(scale) if isinstance(scale, float | int) and not isinstance(scale, bool) and scale > 0 else None


LAWS: Mapping[str, Law] = {
    "same twice": same_twice,
    "changes nothing": leaves_all_as_it_was,
    "leaves steps alone": steps_alone,
    "homogeneous": homogeneous,
    "additive": additive,
    "zero": zero,
    "permutation": permutation,
    "splitting": splitting,
    "unused parameters": unused,
    "frozen parameters": frozen,
    "H = c·I": identity,
    "parameter groups": parameter_groups,
    "weight decay": weight_decay,
    "maximise": maximise,
    "honest residual": honest_residual,
    "singular": singular,
    "not finite": not_finite,
    "warm start": warm_start,
}


def keeps(name: str, probe: Probe) -> LawResult:
    """Return whether a method keeps a law; one that refuses the question is left out."""
    try:
        with quiet():
            return LAWS[name](probe)
    except ConfigurationError as error:
        return LawResult(name, "left out", str(error))
    except BreakdownError as error:
        return LawResult(name, "left out", str(error))
    except Exception as error:  # a check must not end at the first mistake of what it checks
        return LawResult(name, "BROKEN", f"raised {type(error).__name__}: {error}")
