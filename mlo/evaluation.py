"""The gradient of one problem's loss through the responses that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from mlo import traced
from mlo.ambient import Autocast
from mlo.autograd_graph import reject_first_order_operations, reject_reentrant_checkpoints
from mlo.binding import Binding
from mlo.compiled_loss import CannotCompileError
from mlo.compiled_sweep import CompiledSweep
from mlo.errors import ConfigurationError, EvaluationError
from mlo.graph import ProblemGraph
from mlo.links import Links
from mlo.losses import unreached
from mlo.member import Member, MicroBatch
from mlo.optimizer_steps import differentiable_step, optimizer_state, update_derivative
from mlo.outcome import mean_derivatives, replayed
from mlo.recording import RecordedStep, Recording
from mlo.response import respond
from mlo.reverse_pass import gradients
from mlo.stage_function import LossHere, StageFunction
from mlo.status import SolveReport
from mlo.traced import Derivatives, Found
from mlo.vectors import Vector

_CHECKED_SOLVE = 2


@dataclass
class Evaluation:
    """Everything that one gradient of one problem needs, and what it leaves behind.

    Attributes:
        graph: the problem graph.
        links: the graph around each problem.
        members: the problems by name.
        batches: for each problem, the batches and random states that its loss is evaluated on.
        warm_starts: where solvers keep their last solutions.
        reports: the solves, in the order in which they ended; `None` where nobody reads them.
        sweeps: what of a problem's gradient may be compiled as one function, by its name.
        eager: whether nothing is to be compiled.

    """

    graph: ProblemGraph
    links: Mapping[str, Links]
    members: Mapping[str, Member]
    batches: Callable[[Member], list[MicroBatch]]
    warm_starts: MutableMapping[str, Vector]
    reports: list[SolveReport] | None
    sweeps: Mapping[str, CompiledSweep] = field(default_factory=dict)
    eager: bool = False

    def add_responses(self, values: dict[str, Vector], order: Iterable[Member], path: str) -> None:
        """Add one response node for each problem of `order` to the values that a loss at `path` sees."""
        for member in order:
            links = self.links[member.name]
            x = [t for q in links.inputs for t in values[q.name]]
            values[member.name] = respond(self.stage(member, path), links.method, member.trainable, x)

    def stage(self, member: Member, path: str) -> StageFunction:
        """Return the loss of a problem as the response node that a loss at `path` sees of it needs it."""
        return _ProblemStage(self, member, f"{path}/{member.name}")

    def reject_bypasses(self, member: Member, loss: Tensor, own_parameters: bool) -> None:
        """Raise an error if a loss reaches parameters themselves where it should see what is bound for them."""
        reject_reentrant_checkpoints(loss, member.title)
        links = self.links[member.name]
        method = links.method
        if not own_parameters and links.is_read and method.needs_second_derivatives:
            reject_first_order_operations(loss, member.title, type(method).__name__)
        others = [m for m in self.members.values() if not (own_parameters and m is member)]
        at = [p for m in others for p in m.trainable]
        found = iter(gradients([loss], at, retain_graph=True))
        for m in others:
            for name in m.names.trainable:
                if next(found) is not None:
                    raise _bypass(member, m, name, self.graph.direct(member.name))


def _bypass(member: Member, owner: Member, parameter: str, direct: Sequence[str]) -> EvaluationError:
    if owner is member:
        remedy = "Use self(...), self.params, or the module's attribute itself"
    elif owner.name in direct:
        remedy = f"Use self.deps.<role>(...) or self.deps.<role>.params[{parameter!r}]"
    else:
        remedy = f"Declare depends_on={owner.name!r} and read it by self.deps"
    remedy += "; if you do, its module uses a second reference to the parameter, kept in a list, a closure or a cache"
    return EvaluationError(
        f"the loss of problem {member.name!r} reaches the parameter {parameter!r} of problem {owner.name!r} past the "
        f"engine, so that its gradient would be lost; expected access by self or self.deps. {remedy}."
    )


class _ProblemStage(StageFunction):
    """A problem of the engine as its response node sees it."""

    def __init__(self, evaluation: Evaluation, member: Member, path: str) -> None:
        self.name = path
        self.title = member.title
        self.warm_starts = evaluation.warm_starts
        self.reports_solves = evaluation.reports is not None
        self._evaluation, self._member = evaluation, member
        self._autocast = Autocast.capture(member.device_types)

    @property
    def learning_rates(self) -> tuple[float, ...] | None:  # type: ignore[override]
        return self._member.facts.learning_rates

    @property
    def weight_decays(self) -> tuple[float, ...]:  # type: ignore[override]
        return self._member.facts.weight_decays

    @property
    def signs(self) -> tuple[float, ...]:  # type: ignore[override]
        return self._member.facts.signs

    def _batches(self) -> list[MicroBatch]:
        return self._evaluation.batches(self._member)

    def evaluation(self, solution: Sequence[Tensor], inputs: Sequence[Tensor]) -> _StageSpan:
        evaluation, member = self._evaluation, self._member
        values = {member.name: tuple(solution)}
        begin = 0
        for q in evaluation.links[member.name].inputs:
            end = begin + len(q.trainable)
            values[q.name] = tuple(inputs[begin:end])
            begin = end
        return _StageSpan(evaluation, member, self._batches(), values, self.name, self._autocast)

    def recording(self) -> Recording[list[MicroBatch]]:
        member = self._member
        if member.recording is None:
            raise ConfigurationError(
                f"problem {member.name!r}, hypergradient=Unroll: expected optimizer steps to differentiate through; it "
                "has taken none yet. Call engine.step() first, or use an implicit method such as ConjugateGradient."
            )
        if not member.recording.ends_at(member.trainable):
            raise ConfigurationError(
                f"problem {member.name!r}, hypergradient=Unroll: expected parameters that its last solve of "
                f"{member.recording.length} recorded steps has led to; they were changed since, or the solve was "
                "interrupted. Call engine.step(), or use an implicit method such as ConjugateGradient."
            )
        return member.recording

    def update_derivative(self, gradients: Sequence[Tensor | None]) -> Vector:
        optimizer, parameters = self._member.problem.optimizer, self._member.trainable
        assert optimizer is not None, self._member.name  # checked when the engine was built
        step, state = differentiable_step(optimizer, parameters), optimizer_state(optimizer, parameters)
        return update_derivative(step, parameters, gradients, state)

    def at_step(self, step: RecordedStep[list[MicroBatch]]) -> StageFunction:
        return _StageAtStep(self, step.batches)

    @property
    def asks_for_gradients(self) -> bool:
        return self._member.asks_for_gradients

    @asks_for_gradients.setter
    def asks_for_gradients(self, value: bool) -> None:
        self._member.asks_for_gradients = value

    def flags_check_due(self) -> bool:
        # At first it is taken for one that asks, which costs least; what trains makes many differences.
        self._member.differences += 1
        return self._member.differences == _CHECKED_SOLVE

    def repetition_check_due(self) -> bool:
        # What draws numbers of its own is found the first time; a loss that is merely curved is so at many steps.
        return self._member.in_doubt.due()

    def repetition_check_next(self) -> bool:
        schedule = self._member.in_doubt
        if schedule.next_is_due:
            return True
        schedule.count += 1
        return False

    def repetition_failed(self) -> None:
        self._member.in_doubt.count = 0  # the next one is due again

    @property
    def differences_checked(self) -> bool:  # type: ignore[override]
        return min(self._member.differences, self._member.directional_solves) >= _CHECKED_SOLVE

    def symmetry_check_due(self) -> bool:
        # The first solve is left as cheap as it can be; what trains makes many.
        self._member.directional_solves += 1
        return self._member.directional_solves == _CHECKED_SOLVE

    def record(self, report: SolveReport) -> None:
        if self._evaluation.reports is not None:
            self._evaluation.reports.append(report)


class _StageSpan(LossHere):
    """The span of an evaluation of a stage, and in it the loss."""

    __slots__ = (
        "_again",
        "_ambient",
        "_autocast",
        "_batches",
        "_binding",
        "_checked",
        "_compiled",
        "_evaluation",
        "_member",
        "_path",
        "_values",
    )

    def __init__(
        self,
        evaluation: Evaluation,
        member: Member,
        batches: list[MicroBatch],
        values: dict[str, Vector],
        path: str,
        autocast: Autocast,
    ) -> None:
        self._evaluation, self._member, self._batches = evaluation, member, batches
        self._values, self._path, self._autocast = values, path, autocast
        self._again = False

    def __enter__(self) -> LossHere:
        evaluation, member = self._evaluation, self._member
        # What writes to its arguments does so in training too, where every evaluation is checked.
        self._checked = member.in_methods.due()
        self._ambient = self._autocast.restored()
        self._ambient.__enter__()
        try:
            nested = evaluation.links[member.name].nested
            # Checks look at the graph; and torch.compile does not go into the nodes of responses.
            self._compiled = member.compiles and not (self._checked or nested or evaluation.eager)
            if nested:
                evaluation.add_responses(self._values, nested, self._path)
            self._binding = Binding(
                member, self._values, own_parameters=False, spare_buffers=True, checked=self._checked
            )
            self._binding.__enter__()
        except BaseException as error:
            self._ambient.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._binding.__exit__(kind, error, trace)
        finally:
            self._ambient.__exit__(kind, error, trace)

    def __call__(self) -> Tensor:
        member, checked, batches = self._member, self._checked, self._batches
        self._begin()
        if len(batches) == 1:
            loss = replayed(member, *batches[0], checked=checked).loss
        else:
            losses = [replayed(member, batch, state, checked=checked).loss for batch, state in batches]
            loss = torch.stack(losses).mean()
        if checked:
            self._evaluation.reject_bypasses(member, loss, own_parameters=False)
        return loss

    def value_and_gradients(self, at: Sequence[Tensor]) -> tuple[float, Found]:
        wanted = tuple([t for t in at if t.requires_grad]) if self._compiled else ()
        if not wanted:
            return super().value_and_gradients(at)
        try:
            value, found, _ = self._mean(traced.gradient(wanted))
        except CannotCompileError as error:
            result = super().value_and_gradients(at)
            self._give_up(error)
            return result
        return value, _placed(found, at)

    def gradient_and_mixed_product(
        self, theta: Vector, x: Vector, vector: Sequence[Tensor], *, gradient_too: bool
    ) -> tuple[Found | None, Found]:
        wanted = tuple([t for t in x if t.requires_grad]) if self._compiled else ()
        if not wanted:
            return super().gradient_and_mixed_product(theta, x, vector, gradient_too=gradient_too)
        try:
            derivatives = traced.mixed_product(theta, wanted, tuple(vector), gradient_too=gradient_too)
            _, found, reached = self._mean(derivatives)
        except CannotCompileError as error:
            result = super().gradient_and_mixed_product(theta, x, vector, gradient_too=gradient_too)
            self._give_up(error)
            return result
        if not reached:
            raise unreached(self._member.title)
        if not gradient_too:
            return None, _placed(found, x)
        return found[: len(theta)], _placed(found[len(theta) :], x)

    def _give_up(self, error: CannotCompileError) -> None:
        assert self._member.compiled is not None
        self._member.compiled.give_up(error)
        self._compiled = False

    def _mean(self, derivatives: Derivatives) -> tuple[float, Found, bool]:
        self._begin()
        member, batches = self._member, self._batches
        found = [replayed(member, batch, state, checked=False, compiled=derivatives) for batch, state in batches]
        value = sum(o.loss.item() for o in found) / len(found)
        means = mean_derivatives([o.derivatives for o in found if o.derivatives is not None])
        dense = tuple([t.to_dense() if t is not None and t.is_sparse else t for t in means])
        return value, dense, any(o.has_derivatives for o in found)

    def _begin(self) -> None:
        if self._again:
            self._binding.renew_buffers()
        self._again = True


class _StageAtStep(_ProblemStage):
    """A stage on the batches of one of its optimizer steps."""

    def __init__(self, stage: _ProblemStage, batches: list[MicroBatch]) -> None:
        self.__dict__.update(stage.__dict__)
        self._recorded = batches

    @property
    def weight_decays(self) -> tuple[float, ...]:  # type: ignore[override]
        return (0.0,) * len(self._member.trainable)

    @property
    def signs(self) -> tuple[float, ...]:  # type: ignore[override]
        return (1.0,) * len(self._member.trainable)

    def _batches(self) -> list[MicroBatch]:
        return self._recorded


def _placed(found: Sequence[Tensor | None], at: Sequence[Tensor]) -> Found:
    """Return what was found for those of `at` that need a gradient, `None` for the others."""
    given = iter(found)
    return tuple([next(given) if t.requires_grad else None for t in at])
