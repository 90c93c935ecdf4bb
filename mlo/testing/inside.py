"""What the checks need of an engine's inside; no other module of `mlo.testing` looks there."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from mlo.binding import Binding
from mlo.engine import Engine
from mlo.errors import ConfigurationError
from mlo.evaluation import Evaluation
from mlo.graph import ProblemGraph
from mlo.hypergradient import Dense, HypergradientMethod
from mlo.links import Links
from mlo.member import MicroBatch, cuda_devices
from mlo.outcome import replayed
from mlo.random_state import Preserved
from mlo.solve_batches import Previews
from mlo.status import SolveReport
from mlo.testing.flat import joined, separated
from mlo.testing.isolated import isolated, partial_derivatives
from mlo.testing.resolving import Hierarchy, Values
from mlo.vectors import Vector


@contextmanager
def opened(engine: Engine, name: str) -> Iterator[EngineHierarchy]:
    """Let a check look at the hypergradient of one problem, and leave the engine as it was.

    For the span every problem's batches and random draws are pinned to those that `engine.hypergradient` would use, so
    that all evaluations see one function.
    """
    engine._refresh_members()
    differentiated = engine._members[name]
    members = [differentiated, *(engine._members[q] for q in engine.graph.responses(name))]
    before = [dict(vars(m)) for m in engine._members.values()]
    try:
        with (
            Preserved(cuda_devices(engine._members.values())) as state,
            engine._training_modes_kept(),
            torch.inference_mode(False),
        ):
            previews = Previews(differentiated, state)
            for m in members:
                if m is differentiated or m.solve_feed is None:
                    m.micro_batches = previews(m)
                else:
                    m.solve_micro_batches = previews(m)
            yield EngineHierarchy(engine, name, {m.name: previews(m) for m in members})
    finally:
        for m, kept in zip(engine._members.values(), before, strict=True):
            vars(m).update(kept)


class EngineHierarchy(Hierarchy):
    """The problems of an engine that take part in one problem's hypergradient, as plain functions of vectors.

    Losses are evaluated on pinned batches with pinned random draws; buffers are spared. Problems that take no part
    keep their present parameters.
    """

    def __init__(self, engine: Engine, name: str, batches: Mapping[str, list[MicroBatch]]) -> None:
        """Take the problem `name` and all stages that its hypergradient flows through."""
        self._graph, self._members, self._batches = engine.graph, engine._members, batches
        self.name = name
        #: The stages, in an order in which each finds its inputs.
        self.stages: tuple[str, ...] = engine.graph.internal_order(name)
        self._active = (name, *self.stages)
        self._reached: dict[str, dict[str, list[bool]]] = {}

    # --- the hierarchy -----------------------------------------------------------------------------------------

    def inner(self, name: str) -> tuple[str, ...]:
        """Return the stages that stand inside the gradient of `name`."""
        return self._graph.internal_order(name)

    def loss(self, name: str, values: Values) -> float:
        """Return the mean loss over the batches."""
        with torch.no_grad(), self._evaluating(name, values, self._bound(name, values)) as evaluate:
            return evaluate().item()

    def partials(self, name: str, values: Values) -> dict[str, Tensor]:
        """Return ∂L/∂v for the problem itself and for what it reads among `values`."""
        tensors = self._bound(name, values)

        def span(bound: Vector) -> AbstractContextManager[Callable[[], Tensor]]:
            return self._evaluating(name, values, bound)

        def gradient(evaluate: Callable[[], Tensor], at: Vector, create_graph: bool) -> Vector:
            loss = evaluate()
            return partial_derivatives([loss], at, [torch.ones_like(loss)], create_graph=create_graph)

        found = iter(isolated(span, len(tensors), gradient, *tensors))
        return {q: joined([next(found) for _ in self._members[q].trainable]) for q in self._owners(name, values)}

    def stationarity(self, name: str, gradient: Tensor, own: Tensor) -> Tensor:
        """Return ±∂L/∂θ + decay·θ, by the parameter groups of the optimizer."""
        facts = self._members[name].facts
        return self._spread(name, facts.signs) * gradient + self._spread(name, facts.weight_decays) * own

    def objective(self, name: str, loss: float, own: Tensor) -> float | None:
        """Return ±L + ½ decay ‖θ‖², or `None` where the optimizer maximises along some parameters only."""
        facts = self._members[name].facts
        if len(set(facts.signs)) > 1:
            return None
        decays = self._spread(name, facts.weight_decays) * self.takes_part(name)
        return facts.signs[0] * loss + 0.5 * (decays * own.square()).sum().item()

    def takes_part(self, name: str) -> Tensor:
        """Return which entries the loss reaches, itself or through the stages inside its gradient."""
        reached = [self._reach(reader)[name] for reader in (name, *self.inner(name)) if name in self._reach(reader)]
        return self._spread(name, [any(flags) for flags in zip(*reached, strict=True)])

    # --- the engine's present state ----------------------------------------------------------------------------

    def present(self) -> dict[str, Tensor]:
        """Return the present parameters of all problems that take part."""
        return {q: joined([p.detach() for p in self._members[q].trainable]).clone() for q in self._active}

    def parameters(self) -> dict[str, dict[str, Tensor]]:
        """Return the trainable parameters of all problems that take part, in the order in which they are joined."""
        members = {q: self._members[q] for q in self._active}
        return {q: dict(zip(m.names.trainable, m.trainable, strict=True)) for q, m in members.items()}

    def inputs(self, stage: str) -> tuple[str, ...]:
        """Return what the response of a stage depends on, among the problems that take part."""
        return tuple(q for q in self._graph.inputs(stage) if q in self._active)

    def method(self, stage: str) -> HypergradientMethod:
        """Return the method of a stage."""
        return self._graph.method(stage)

    @contextmanager
    def placed(self, values: Values) -> Iterator[None]:
        """Let the engine stand at `values` for a span.

        The parameters get other storage meanwhile, so that theirs is not even written to.
        """
        before = [(p, p.data) for q in self._active for p in self._members[q].trainable]
        try:
            for q in self._active:
                parameters = self._members[q].trainable
                for p, value in zip(parameters, separated(values[q], parameters), strict=True):
                    p.data = value.detach().clone()
            yield
        finally:
            for p, data in before:
                p.data = data

    def pulled_back(self, stage: str, cotangent: Tensor) -> tuple[dict[str, Tensor], list[SolveReport]]:
        """Return the cotangents of the inputs of a stage's response node by its own method, and its solves.

        The engine must stand at solutions. Responses inside the stage's gradient are solved densely, whatever their
        methods, so that only this method can be wrong.
        """
        graph = _DenseInside(self._graph, stage)
        solves: list[SolveReport] = []
        evaluation = self._evaluation(graph, solves)
        wanted, member = self.inputs(stage), self._members[stage]
        values = {q: self._members[q].constants() for q in graph.inputs(stage)}
        leaves = [t.requires_grad_() for q in wanted for t in values[q]]
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            evaluation.add_responses(values, [member], self.name)
            cotangents = separated(cotangent, member.trainable)
            found = iter(partial_derivatives(values[stage], leaves, cotangents, create_graph=False))
        return {q: joined([next(found) for _ in values[q]]) for q in wanted}, solves

    def _evaluation(self, graph: ProblemGraph, solves: list[SolveReport] | None = None) -> Evaluation:
        links = {name: Links(graph, self._members, name) for name in graph.names}
        return Evaluation(graph, links, self._members, lambda m: self._batches[m.name], {}, solves)

    # --- evaluating a loss -------------------------------------------------------------------------------------

    def _owners(self, name: str, active: Container[str]) -> tuple[str, ...]:
        """Return the problem itself and what its loss reads directly, among those that are active."""
        return (name, *(q for q in self._graph.direct(name) if q in active))

    def _bound(self, name: str, values: Values) -> Vector:
        return tuple(t for q in self._owners(name, values) for t in separated(values[q], self._members[q].trainable))

    @contextmanager
    def _evaluating(self, name: str, active: Container[str], tensors: Vector) -> Iterator[Callable[[], Tensor]]:
        """Bind tensors for the problem and for what it reads among `active`, and hand out its loss."""
        member, given = self._members[name], iter(tensors)
        values = {q: tuple(next(given) for _ in self._members[q].trainable) for q in self._owners(name, active)}
        values |= {q: self._members[q].constants() for q in self._graph.direct(name) if q not in values}

        def evaluate() -> Tensor:
            losses = []
            for batch, state in self._batches[name]:
                losses.append(replayed(member, batch, state)[0])
            return torch.stack(losses).mean()

        with Binding(member, values, own_parameters=False, spare_buffers=True):
            yield evaluate

    def _reach(self, reader: str) -> dict[str, list[bool]]:
        """Return which parameters a loss reaches by itself, by their problem."""
        if reader not in self._reached:
            values = self.present()
            leaves = tuple(t.detach().requires_grad_() for t in self._bound(reader, values))
            with torch.enable_grad(), self._evaluating(reader, values, leaves) as evaluate:
                loss = evaluate()
                found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
            flags = iter([g is not None for g in found] or [False] * len(leaves))
            self._reached[reader] = {
                q: [next(flags) for _ in self._members[q].trainable] for q in self._owners(reader, values)
            }
        return self._reached[reader]

    def _spread(self, name: str, factors: Sequence[float]) -> Tensor:
        """Return a vector with one factor for each parameter of a problem, repeated for its entries."""
        parameters = self._members[name].trainable
        return joined([torch.full_like(p, f, dtype=_dtype(f)) for p, f in zip(parameters, factors, strict=True)])


def _dtype(factor: float) -> torch.dtype:
    return torch.bool if isinstance(factor, bool) else torch.float64


class _DenseInside(ProblemGraph):
    """A graph in which all methods but one solve densely, and what is checked when a graph is built is known."""

    def __init__(self, graph: ProblemGraph, stage: str) -> None:
        self.__dict__.update(graph.__dict__)
        self._stage = stage

    def method(self, name: str) -> HypergradientMethod:
        return super().method(name) if name == self._stage else Dense(max_size=10**9)


def require_double_precision(hierarchy: EngineHierarchy) -> None:
    """Raise an error if a problem that takes part has parameters of another precision than float64."""
    for problem, parameters in hierarchy.parameters().items():
        for n, p in parameters.items():
            if p.dtype != torch.float64:
                raise ConfigurationError(
                    f"problem {problem!r}, parameter {n!r}: expected torch.float64, in which differences of re-solved "
                    f"losses can be told from rounding; got {p.dtype}. Call .double() on the module before its "
                    "optimizer is built, and give it float64 data."
                )
