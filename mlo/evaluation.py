"""The gradient of one problem's loss through the responses that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlo.ambient import Autocast
from mlo.autograd_graph import reject_first_order_operations, reject_reentrant_checkpoints
from mlo.compiled_loss import CannotCompileError, Derivatives, Found
from mlo.errors import ConfigurationError, EvaluationError, LossError
from mlo.frame import Frame, ModuleSlots
from mlo.graph import ProblemGraph
from mlo.links import Links
from mlo.losses import checked_loss, unreached
from mlo.member import Member, MicroBatch
from mlo.optimizer_steps import differentiable_step, optimizer_state, update_derivative
from mlo.random_state import RandomState
from mlo.recording import RecordedStep, Recording
from mlo.response import respond
from mlo.reverse_pass import gradients
from mlo.stage_function import LossHere, StageFunction
from mlo.status import SolveReport
from mlo.vectors import Vector

_CHECKED_SOLVE = 2


class Binding:
    """The span of one evaluation: the loss of `member` sees `values` for itself and for what it depends on.

    A context manager whose value is the `Frame`. With `own_parameters` the problem sees its parameters themselves, with
    `spare_buffers` it writes to copies of its buffers.

    Raises:
        EvaluationError: (at the end, with `checked`) the block wrote to one of the tensors in place. Autograd refuses
            such writes to what needs a gradient; this finds those to constants and those under `torch.no_grad()`.

    """

    __slots__ = (
        "_before",
        "_checked",
        "_member",
        "_own",
        "_slots",
        "_spare",
        "_spared",
        "_swapped",
        "_values",
        "_versions",
        "_watched",
    )

    def __init__(
        self,
        member: Member,
        values: Mapping[str, Vector],
        *,
        own_parameters: bool,
        spare_buffers: bool,
        checked: bool = True,
    ) -> None:
        """Take note of what to swap; nothing is touched yet."""
        self._member, self._values, self._checked = member, values, checked
        self._own, self._spare = own_parameters, spare_buffers

    def __enter__(self) -> Frame:
        """Swap the tensors in."""
        member, values = self._member, self._values
        place, seen = member.problem.__dict__, member.seen
        tensors: list[Tensor] = []
        for name in seen:
            tensors += values[name]
        self._before = place.get("_frame")
        self._slots = member.slots_read if self._own else member.slots_seen
        self._swapped = self._slots.put(tensors)
        self._spared: list[tuple[ModuleSlots, list[Any]]] = []
        if self._spare:
            for m in seen.values():
                if m.slots.has_buffers:
                    self._spared.append((m.slots, m.slots.copy_buffers()))
        if self._checked:
            for m in seen.values():
                if m.names.constant:
                    tensors += m.names.constant.values()
            self._watched, self._versions = tensors, [t._version for t in tensors]
        frame = place["_frame"] = Frame(values, seen)  # past the checks of options, at every evaluation
        return frame

    def renew_buffers(self) -> None:
        """Begin with the problems' own buffers again, where they are spared."""
        if self._spared:
            self._restore_buffers()
            for slots, _ in self._spared:
                slots.copy_buffers()

    def _restore_buffers(self) -> None:
        # Backwards: modules of two problems may share a part, and the second has then copied the copies of the first.
        for slots, kept in reversed(self._spared):
            slots.restore_buffers(kept)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Swap them out again, whatever has happened."""
        self._member.problem.__dict__["_frame"] = self._before
        if self._spared:
            self._restore_buffers()
        self._slots.restore(self._swapped)
        if kind is None and self._checked and self._versions != [t._version for t in self._watched]:
            self._raise_for_in_place()

    def _raise_for_in_place(self) -> None:
        seen = self._member.seen.values()
        named = [(m.name, n) for m in seen for n in m.names.trainable]
        named += [(m.name, n) for m in seen for n in m.names.constant]
        changed = [
            place for place, before, t in zip(named, self._versions, self._watched, strict=True) if before != t._version
        ]
        owner, name = changed[0]
        raise EvaluationError(
            f"the loss of problem {self._member.name!r} changed the parameter {name!r} of problem {owner!r} in place "
            "(it keeps its new value); expected a loss that only reads parameters. Use an out-of-place operation, or "
            "clone() first; a running average belongs in a buffer (register_buffer)."
        )


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

    """

    graph: ProblemGraph
    links: Mapping[str, Links]
    members: Mapping[str, Member]
    batches: Callable[[Member], list[MicroBatch]]
    warm_starts: MutableMapping[str, Vector]
    reports: list[SolveReport] | None

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

    def repetition_failed(self) -> None:
        self._member.in_doubt.count = 0  # the next one is due again

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
            self._compiled = member.compiles and not self._checked and not nested
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
            value, found, _ = self._mean(Derivatives(wanted))
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
            _, found, reached = self._mean(Derivatives(theta, wanted, tuple(vector), gradient_too))
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


def _placed(found: Found, at: Sequence[Tensor]) -> Found:
    """Return what was found for those of `at` that need a gradient, `None` for the others."""
    given = iter(found)
    return tuple([next(given) if t.requires_grad else None for t in at])


class Outcome(NamedTuple):
    """What one evaluation of a loss gave.

    Attributes:
        loss: a finite scalar; without a graph where `derivatives` are given.
        metrics: what is logged beside it.
        derivatives: those that were asked for.
        has_derivatives: whether the loss reaches any of the tensors of its gradient.

    """

    loss: Tensor
    metrics: dict[str, float]
    derivatives: Found | None
    has_derivatives: bool = True


def mean_derivatives(found: Sequence[Found]) -> Found:
    """Return the derivatives of the mean loss of several batches."""
    if len(found) == 1:
        return found[0]
    means: list[Tensor | None] = []
    for parts in zip(*found, strict=True):
        present = [t for t in parts if t is not None]
        means.append(sum(present[1:], start=present[0]) / len(parts) if present else None)
    return tuple(means)


def outcome(member: Member, batch: Any, *, checked: bool = True, compiled: Derivatives | None = None) -> Outcome:
    """Evaluate a problem's loss on one batch, with derivatives where they are to come from compiled code.

    Raises:
        EvaluationError: (if `checked`) it changed the batch in place.

    """
    versions = _versions(batch) if checked else None
    found: Found | None = None
    reached = True
    if compiled is None:
        result = member.problem.training_step(batch)
    else:
        result, found, reached = member.compiled_loss(batch, compiled)
    if checked and versions != _versions(batch):
        raise EvaluationError(
            f"{member.title} changed its batch in place; expected a loss that only reads it, since a batch is used "
            "again when the stage's response is differentiated. Use an out-of-place operation, or clone() first."
        )
    if isinstance(result, Tensor) or not isinstance(result, Mapping):
        return Outcome(checked_loss(result, member.title), {}, found, reached)
    if "loss" not in result:
        raise LossError(
            f"{member.title} returned a dict with {', '.join(map(repr, result)) or 'nothing'}; expected the key 'loss'."
        )
    metrics = {key: number(value, f"{member.title}, {key!r}") for key, value in result.items() if key != "loss"}
    return Outcome(checked_loss(result["loss"], member.title), metrics, found, reached)


def replayed(
    member: Member, batch: Any, state: RandomState, *, checked: bool = True, compiled: Derivatives | None = None
) -> Outcome:
    """Evaluate a problem's loss with the random draws that begin at `state`."""
    state.restore()
    if not member.host_draws.unknown:
        return outcome(member, batch, checked=checked, compiled=compiled)
    before = member.host_draws.before()
    result = outcome(member, batch, checked=checked, compiled=compiled)
    member.host_draws.after(before)
    return result


def _versions(batch: Any) -> list[int]:
    versions = []
    # Most batches are a tuple or a list of tensors, for which going through a tree takes longest.
    for part in batch if isinstance(batch, tuple | list) else (batch,):
        if isinstance(part, Tensor):
            versions.append(part._version)
        else:
            versions += [t._version for t in pytree.tree_leaves(part) if isinstance(t, Tensor)]
    return versions


def number(value: object, what: str) -> float:
    """Return a logged value as a number."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise LossError(
            f"{what} returned {type(value).__name__}; expected a number or a tensor with one element to log."
        ) from None
