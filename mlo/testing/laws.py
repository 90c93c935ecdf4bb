"""Laws that every method must keep, whether its solves converge or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mlo.errors import BreakdownError, ConfigurationError
from mlo.hypergradient import HypergradientMethod
from mlo.testing.level import LEARNING_RATE, WHOLE, Layout, Numbers, OptimizerFactory, with_gradient
from mlo.testing.outcomes import LawResult
from mlo.testing.probe import READ, SIZE, Probe, Vectors, quiet, ready
from mlo.testing.purity import changed_by_a_hypergradient, changed_by_a_step
from mlo.testing.watched import damping_of, watched

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
    same = torch.allclose(first[:READ].double(), fresh, rtol=eps, atol=0, equal_nan=True)
    return _result("same twice", "" if same else "a new engine at the same point gives another answer")


def changes_nothing(probe: Probe) -> LawResult:
    """A hypergradient changes no parameter, buffer, `.grad`, optimizer, training mode or random state."""
    return _result("changes nothing", changed_by_a_hypergradient(probe))


def leaves_steps_alone(probe: Probe) -> LawResult:
    """In a step of the engine a method touches neither the stage's parameters nor the random generators."""
    return _result("leaves steps alone", changed_by_a_step(probe))


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
    return _same_for_layouts(probe, "splitting", WHOLE, Layout(((), (2, 1), None)), Layout(((),) * SIZE))


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
        stage = probe.stage(hessian=c * torch.eye(SIZE, dtype=torch.float64), curved=False)
        found, watch = probe.answer(probe.solved(probe.a, stage))
        exact = probe.coupling[:, :READ].T @ probe.a / c
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
    exact = probe.coupling[:, :READ].T @ (rates * probe.a)
    return _result("parameter groups", probe.differs(found, exact, [watch]))


def weight_decay(probe: Probe) -> LawResult:
    """An L2 decay of the optimizer is the same as the penalty in the loss."""
    inside = probe.stage(hessian=probe.hessian + 0.5 * torch.eye(SIZE, dtype=torch.float64))
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


def _scale(method: HypergradientMethod) -> float | None:
    """Return the number that a method takes for the inverse of the curvature, if it has one."""
    if method.needs_learning_rate:
        return LEARNING_RATE
    scale = getattr(method, "scale", None)
    return float(scale) if isinstance(scale, float | int) and not isinstance(scale, bool) and scale > 0 else None


LAWS: Mapping[str, Law] = {
    "same twice": same_twice,
    "changes nothing": changes_nothing,
    "leaves steps alone": leaves_steps_alone,
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
