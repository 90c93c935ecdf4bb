"""`check_hypergradient`: a graph's hypergradient against re-solving, and each stage's own share of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.engine import Engine
from mlo.errors import BreakdownWarning, ConfigurationError
from mlo.options import is_count, is_number
from mlo.testing.comparison import Comparison, compared
from mlo.testing.differences import Derivative, derivative
from mlo.testing.errors import CheckError
from mlo.testing.flat import joined, unit_vector
from mlo.testing.inside import EngineHierarchy, opened, require_double_precision
from mlo.testing.newton import Newton
from mlo.testing.resolving import Resolver, solvers_for
from mlo.testing.solver import Solver
from mlo.testing.tables import shown, table

# The first step of a difference, as a share of the point's length.
_STEP = 1e-2
# A reference is extrapolated until it is this much more accurate than what is asked for.
_MARGIN = 0.01


@dataclass(frozen=True)
class HypergradientCheck:
    """What `check_hypergradient` found; true if all is right.

    Attributes:
        problem: the problem whose hypergradient was checked.
        total: the whole hypergradient, along random directions in all its parameters.
        parameters: likewise along random directions in single parameters, for those that were asked for.
        stages: each stage's own response, in solve order.

    """

    problem: str
    total: Comparison
    parameters: tuple[Comparison, ...]
    stages: tuple[Comparison, ...]

    @property
    def lines(self) -> tuple[Comparison, ...]:
        """All comparisons, the stages first."""
        return (*self.stages, self.total, *self.parameters)

    @property
    def ok(self) -> bool:
        """Whether the hypergradient and each stage's share of it are right."""
        return all(line.ok for line in self.lines)

    @property
    def wrong(self) -> tuple[str, ...]:
        """The names of the stages whose own response is not right."""
        return tuple(line.name for line in self.stages if not line.ok)

    @property
    def worst(self) -> Comparison:
        """The stage that is most in error; where all stages are right, the line that is."""
        candidates = [line for line in self.stages if not line.ok] or [x for x in self.lines if not x.ok] or self.lines
        return max(candidates, key=lambda line: line.error)

    def __bool__(self) -> bool:
        """Whether all is right."""
        return self.ok

    def raise_if_wrong(self) -> HypergradientCheck:
        """Return the check itself, or raise `CheckError` with its report."""
        if not self.ok:
            raise CheckError(str(self))
        return self

    def __repr__(self) -> str:
        """Return one line."""
        return f"<HypergradientCheck of {self.problem!r}: {self._summary()}>"

    def __str__(self) -> str:
        """Return the table, and what can be done about the worst line."""
        rows = [("stage", "method", "its solves", "relative error", "verdict")]
        for line in self.lines:
            statuses = ", ".join(s.name for s in line.statuses) or "–"
            rows.append((line.name, line.method or "–", statuses, shown(line.error), line.verdict))
        text = f"hypergradient of {self.problem!r}: {self._summary()}\n{table(rows)}"
        return text if self.ok else f"{text}\n{self._advice()}"

    def _summary(self) -> str:
        if self.ok:
            return f"ok (largest relative error {shown(self.worst.error)})"
        worst = self.worst
        where = f"at stage {worst.name!r}" if worst in self.stages else f"in the {worst.name}"
        return f"{worst.verdict} {where} (relative error {shown(worst.error)}, expected at most {worst.rtol:.0e})"

    def _advice(self) -> str:
        worst = self.worst
        if worst.verdict == "UNRESOLVED":
            return (
                f"Re-solving itself is known to a relative {worst.uncertainty:.0e} only. Choose another step=, a "
                "solver with a smaller tolerance (solve=), or a larger rtol=. A loss has no derivative at a kink."
            )
        if worst not in self.stages:
            return (
                "Each stage's own response is right and the sum is not: look at how the loss of "
                f"{self.problem!r} reads its dependencies, and at the solves of the whole (engine.step reports them)."
            )
        remedies = [s.remedy for s in worst.statuses if s.name != "CONVERGED"]
        if remedies:
            return f"{worst.name!r}: {remedies[0]}"
        if not worst.statuses:
            return f"{worst.name!r}: {worst.method} reports no solve; a method that passes no gradient is never right."
        return (
            f"{worst.name!r}: {worst.method} says that its solves converged, and the derivative of the re-solved stage "
            "is another one. A detach() or no_grad() in its loss hides a dependence, or solve=LBFGS() has not solved "
            "it exactly enough (try a smaller tolerance); else the method is wrong."
        )


def check_hypergradient(
    engine: Engine,
    name: str,
    *,
    directions: int = 3,
    parameters: Sequence[str] = (),
    step: float | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-9,
    solve: Solver | Mapping[str, Solver] | None = None,
    seed: int = 0,
) -> HypergradientCheck:
    """Compare `engine.hypergradient(name)` with what re-solving all stages below gives: the gradcheck of this field.

    With θ*(x) the solutions of all stages that the problem leads, re-solved to rounding in the order of the graph
    (nested levels inside of each evaluation), and F its loss, the hypergradient must satisfy, for any d,

        ⟨dF/dx, d⟩ = lim [F(x + h·d, θ*(x + h·d)) − F(x − h·d, θ*(x − h·d))] / 2h,

    taken by Richardson extrapolation in h. To tell *which* stage is wrong, each stage j is also checked by itself: for
    random unit vectors c and d, the vector–Jacobian product of its response node must satisfy

        ⟨cᵀ ∂θ_j*/∂u, d⟩ = lim ⟨c, θ_j*(u + h·d) − θ_j*(u − h·d)⟩ / 2h,     u all inputs of the stage,

    while stages nested inside it are solved densely, so that the error of one is not laid at the door of another.

    The implicit gradient equals re-solving at solutions only. So everything is compared at the stages' solutions for
    the problem's present parameters, where the engine is put for the span of the call. Losses are
    evaluated on the batches and with the random draws that the hypergradient uses. The engine is left exactly as it
    was: parameters, buffers, `.grad`, optimizers, random state, data position; after an exception too.

    Args:
        engine: the engine.
        name: the problem whose hypergradient is checked.
        directions: how many random directions are tried, for the whole and for each stage.
        parameters: names of parameters of the problem along each of which `directions` more are tried, so
            that an error in a small one cannot hide behind a large one.
        step: the first h. `None`: a hundredth of the length of x (of u), at least 0.01.
        rtol: the largest relative error that is right. An iterative method is right up to its own tolerance times the
            condition number of the stage.
        atol: differences up to this size are right.
        solve: how stages are re-solved: `mlo.testing.Newton()` (the default), `mlo.testing.LBFGS()`, or a mapping
            from names of stages to solvers.
        seed: the directions are drawn from a generator of their own with this seed.

    Raises:
        ConfigurationError: an argument is out of range, a parameter is not in float64, or a stage has too many
            parameters for its solver.
        NotSolvedError: a stage cannot be re-solved; the message names it.

    Exceptions of the losses, and `BreakdownError` by a method's policy, pass through.

    Cost: about (4 to 12)·directions·(1 + number of stages) re-solves, each of a few gradients of the stage's loss,
    after one Jacobian per stage of two gradients per parameter. Stages that are nested multiply their costs: seconds
    for three levels of three parameters each, a minute for four.

    >>> import mlo.testing
    >>> problem = mlo.testing.zoo.chain(2)
    >>> engine = problem.engine(mlo.ConjugateGradient())
    >>> bool(mlo.testing.check_hypergradient(engine, problem.upper))
    True
    >>> engine = problem.engine({"w1": mlo.ConjugateGradient(), "w2": mlo.StopGradient()})
    >>> mlo.testing.check_hypergradient(engine, problem.upper).wrong
    ('w2',)

    """
    _check_arguments(engine, name, directions, step, rtol, atol, seed)
    generator = torch.Generator().manual_seed(seed)
    with opened(engine, name) as hierarchy, warnings.catch_warnings():
        warnings.simplefilter("ignore", BreakdownWarning)  # the report tells it
        require_double_precision(hierarchy)
        _check_parameters(hierarchy, parameters)
        resolver = Resolver(hierarchy, solvers_for(hierarchy.stages, Newton() if solve is None else solve, Newton()))
        check = _Check(engine, hierarchy, resolver, directions, step, rtol, atol, generator)
        total, *single = check.totals(parameters)
        return HypergradientCheck(name, total, tuple(single), tuple(check.stage(s) for s in hierarchy.stages))


class _Check:
    """One run of `check_hypergradient`, at the solutions for the problem's present parameters."""

    def __init__(
        self,
        engine: Engine,
        hierarchy: EngineHierarchy,
        resolver: Resolver,
        directions: int,
        step: float | None,
        rtol: float,
        atol: float,
        generator: torch.Generator,
    ) -> None:
        self._engine, self._hierarchy, self._resolver = engine, hierarchy, resolver
        self._directions, self._step, self._rtol, self._atol = directions, step, rtol, atol
        self._generator = generator
        self._values = resolver.solved(hierarchy.name, hierarchy.present())

    def totals(self, parameters: Sequence[str]) -> list[Comparison]:
        """Compare the whole hypergradient, along all parameters and along each of some."""
        name = self._hierarchy.name
        own = self._hierarchy.parameters()[name]
        with self._hierarchy.placed(self._values):
            gradients = self._engine.hypergradient(name)
        gradient = joined([gradients[n] for n in own])
        lines = []
        for only in (None, *parameters):
            mask = joined([torch.full_like(p, only in (None, n)) for n, p in own.items()])
            found, expected = [], []
            for _ in range(self._directions):
                direction = self._direction(mask)
                found.append(torch.dot(gradient, direction).item())
                expected.append(self._slope(direction, self._reduced_loss))
            title = "total" if only is None else f"total, parameter {only!r}"
            lines.append(compared(title, found, expected, rtol=self._rtol, atol=self._atol))
        return lines

    def stage(self, stage: str) -> Comparison:
        """Compare one stage's own response."""
        inputs, taking_part = self._hierarchy.inputs(stage), self._hierarchy.takes_part(stage).double()
        found, expected, statuses = [], [], []
        for _ in range(self._directions):
            cotangent = self._direction(taking_part)
            with self._hierarchy.placed(self._values):
                pulled_back, reports = self._hierarchy.pulled_back(stage, cotangent)
            statuses += [r.status for r in reports if r.stage == f"{self._hierarchy.name}/{stage}"]
            mask = joined([torch.ones_like(self._values[q]) for q in inputs])
            direction = self._direction(mask)
            gradient = joined([pulled_back[q] for q in inputs])
            found.append(torch.dot(gradient, direction).item())
            size = torch.linalg.vector_norm(self._values[stage]).item()
            expected.append(self._slope(direction, self._response_along(stage, cotangent), inputs, size))
        return compared(
            stage,
            found,
            expected,
            rtol=self._rtol,
            atol=self._atol,
            method=type(self._hierarchy.method(stage)).__name__,
            statuses=statuses,
        )

    def _reduced_loss(self, values: Mapping[str, Tensor]) -> float:
        return self._resolver.reduced_loss(self._hierarchy.name, values)

    def _response_along(self, stage: str, cotangent: Tensor) -> Callable[[Mapping[str, Tensor]], float]:
        base = self._values[stage]

        def along(values: Mapping[str, Tensor]) -> float:
            return torch.dot(cotangent, self._resolver.solution(stage, values) - base).item()

        return along

    def _direction(self, mask: Tensor) -> Tensor:
        """Return a random unit vector over the entries where `mask` is 1."""
        direction = unit_vector(len(mask), self._generator).to(mask.device) * mask
        return direction.div(torch.linalg.vector_norm(direction))

    def _slope(
        self,
        direction: Tensor,
        function: Callable[[Mapping[str, Tensor]], float],
        moved: Sequence[str] | None = None,
        size: float = 0.0,
    ) -> Derivative:
        """Return the derivative of a function of all values along a direction in some of them."""
        names = (self._hierarchy.name,) if moved is None else moved
        start = [self._values[q] for q in names]
        parts = torch.split(direction, [len(v) for v in start])

        def shifted(t: float) -> float:
            return function({**self._values, **{q: v + t * d for q, v, d in zip(names, start, parts, strict=True)}})

        length = torch.linalg.vector_norm(joined(start)).item()
        step = _STEP * max(1.0, length) if self._step is None else self._step
        return derivative(shifted, step, rtol=_MARGIN * self._rtol, size=size)


def _check_arguments(
    engine: object, name: object, directions: object, step: object, rtol: object, atol: object, seed: object
) -> None:
    if not isinstance(engine, Engine):
        raise ConfigurationError(f"check_hypergradient(engine={engine!r}): expected an mlo.Engine.")
    if name not in engine.graph.names:
        raise ConfigurationError(
            f"check_hypergradient(name={name!r}): expected the name of a problem, one of "
            f"{', '.join(engine.graph.names)}."
        )
    if not is_count(directions):
        raise ConfigurationError(f"check_hypergradient(directions={directions!r}): expected an integer of at least 1.")
    if not (isinstance(seed, int) and not isinstance(seed, bool)):
        raise ConfigurationError(f"check_hypergradient(seed={seed!r}): expected an integer.")
    for option, value in (("step", step), ("rtol", rtol), ("atol", atol)):
        if option == "step" and value is None:
            continue
        if not is_number(value) or value < 0 or (value == 0 and option != "atol"):  # type: ignore[operator]
            kind = "number of at least 0" if option == "atol" else "positive number"
            raise ConfigurationError(f"check_hypergradient({option}={value!r}): expected a {kind}.")


def _check_parameters(hierarchy: EngineHierarchy, parameters: Sequence[str]) -> None:
    known = hierarchy.parameters()[hierarchy.name]
    if isinstance(parameters, str):
        raise ConfigurationError(
            f"check_hypergradient(parameters={parameters!r}): expected a sequence of names, e.g. [{parameters!r}]."
        )
    for n in parameters:
        if n not in known:
            raise ConfigurationError(
                f"check_hypergradient(parameters=…): problem {hierarchy.name!r} has no trainable parameter {n!r}; it "
                f"has {', '.join(known)}."
            )
