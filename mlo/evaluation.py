"""The gradient of one problem's loss through the responses that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mlo.ambient import Autocast
from mlo.autodiff import gradients
from mlo.autograd_graph import reject_first_order_operations, reject_reentrant_checkpoints
from mlo.errors import ConfigurationError, EvaluationError, LossError
from mlo.frame import Frame
from mlo.graph import ProblemGraph
from mlo.losses import checked_loss, unreached, without_graph
from mlo.member import Member, MicroBatch
from mlo.optimizer_steps import differentiable_step, optimizer_state, update_derivative
from mlo.random_state import RandomState, host_state, preserved, same_host_state
from mlo.recording import RecordedStep, Recording
from mlo.response import respond
from mlo.stage_function import StageFunction, leaves
from mlo.status import SolveReport
from mlo.vectors import Vector

_CHECKED_SOLVE = 2


class Binding:
    """The span of one evaluation: the loss of `member` sees `values` for itself and for what it depends on.

    A context manager whose value is the `Frame`.

    Raises:
        EvaluationError: (at the end) the block wrote to one of the tensors in place. Autograd refuses such writes to
            what needs a gradient; this finds those to constants and those under `torch.no_grad()`.

    """

    def __init__(
        self,
        member: Member,
        direct: Sequence[Member],
        values: Mapping[str, Vector],
        own_parameters: bool,
        spare_buffers: bool,
    ) -> None:
        """Take note of what to swap; nothing is touched yet."""
        self._member = member
        self._seen = (member, *direct)
        self._swapped = direct if own_parameters else self._seen
        self._spared = self._seen if spare_buffers else ()
        self._values = values
        self._frame = Frame(values, {m.name: m.names for m in self._seen})
        self._undo: list[tuple[Callable[[list[Any]], None], list[Any]]] = []

    def __enter__(self) -> Frame:
        """Swap the tensors in."""
        self._versions = self._present_versions()
        self._before = self._member.problem._frame
        for m in self._swapped:
            self._undo.append((m.slots.restore, m.slots.put(self._values[m.name])))
        for m in self._spared:
            self._undo.append((m.slots.restore_buffers, m.slots.copy_buffers()))
        self._member.problem._frame = self._frame
        return self._frame

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Swap them out again, whatever has happened."""
        self._member.problem._frame = self._before
        for restore, kept in reversed(self._undo):
            restore(kept)
        if kind is None and self._versions != self._present_versions():
            self._raise_for_in_place()

    def _present_versions(self) -> list[int]:
        bound = [t._version for m in self._seen for t in self._values[m.name]]
        return bound + [t._version for m in self._seen for t in m.names.constant.values()]

    def _raise_for_in_place(self) -> None:
        named = [(m.name, n) for m in self._seen for n in m.names.trainable]
        named += [(m.name, n) for m in self._seen for n in m.names.constant]
        changed = [
            place
            for place, before, after in zip(named, self._versions, self._present_versions(), strict=True)
            if before != after
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
        members: the problems by name.
        batches: for each problem, the batches and random states that its loss is evaluated on.
        warm_starts: where solvers keep their last solutions.
        reports: the solves, in the order in which they ended.

    """

    graph: ProblemGraph
    members: Mapping[str, Member]
    batches: Callable[[Member], list[MicroBatch]]
    warm_starts: MutableMapping[str, Vector]
    reports: list[SolveReport] = field(default_factory=list)

    def constants(self, names: Iterable[str]) -> dict[str, Vector]:
        """Return the present parameters of problems as constants."""
        return {name: tuple(p.detach() for p in self.members[name].trainable) for name in names}

    def add_responses(self, values: dict[str, Vector], order: Iterable[str], path: str) -> None:
        """Add one response node for each problem of `order` to the values that a loss at `path` sees."""
        for name in order:
            member, inputs = self.members[name], self.graph.inputs(name)
            stage = _ProblemStage(self, member, f"{path}/{name}", [len(values[q]) for q in inputs])
            x = [t for q in inputs for t in values[q]]
            values[name] = respond(stage, self.graph.method(name), member.trainable, x)

    def bound(
        self, member: Member, values: Mapping[str, Vector], *, own_parameters: bool, spare_buffers: bool
    ) -> Binding:
        """Let a problem's loss see `values`, for a span that covers its backward pass.

        With `own_parameters` the problem sees its parameters themselves.
        """
        direct = [self.members[d] for d in self.graph.direct(member.name)]
        return Binding(member, direct, values, own_parameters, spare_buffers)

    def reject_bypasses(self, member: Member, loss: Tensor, own_parameters: bool) -> None:
        """Raise an error if a loss reaches parameters themselves where it should see what is bound for them."""
        reject_reentrant_checkpoints(loss, title(member))
        method = self.graph.method(member.name)
        if not own_parameters and self.graph.readers(member.name) and method.needs_second_derivatives:
            reject_first_order_operations(loss, title(member), type(method).__name__)
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


def _reject_hidden_gradients(member: Member, own: Sequence[Tensor], has_responses: bool) -> None:
    """Raise an error for what would make `.grad` something else than the total gradient."""
    for name, p in zip(member.names.trainable, own, strict=True):
        if p.grad is not None:
            raise EvaluationError(
                f"the loss of problem {member.name!r} left a gradient in the parameter {name!r}; expected a loss that "
                "calls no backward(): the engine does, and would count it twice. For a gradient inside the loss use "
                "torch.autograd.grad(..., create_graph=True)."
            )
        if has_responses and (p._backward_hooks or p._post_accumulate_grad_hooks):
            raise EvaluationError(
                f"the parameter {name!r} of problem {member.name!r} has a gradient hook, which would see the direct "
                "gradient and the one through the responses one after the other instead of their sum; expected none. "
                "Use grad_clip=, or a pre-step hook of the optimizer (register_step_pre_hook)."
            )


class _ProblemStage(StageFunction):
    """A problem of the engine as its response node sees it."""

    def __init__(self, evaluation: Evaluation, member: Member, path: str, input_sizes: Sequence[int]) -> None:
        self.name = path
        self.title = title(member)
        self.warm_starts = evaluation.warm_starts
        self._evaluation, self._member, self._input_sizes = evaluation, member, input_sizes
        self._autocast = Autocast.capture(d.type for d in member.devices)

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

    @contextmanager
    def evaluation(self, solution: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[Callable[[], Tensor]]:
        evaluation, member = self._evaluation, self._member
        batches = self._batches()
        values = {member.name: tuple(solution)}
        given = iter(inputs)
        for name, size in zip(evaluation.graph.inputs(member.name), self._input_sizes, strict=True):
            values[name] = tuple(next(given) for _ in range(size))

        def evaluate() -> Tensor:
            losses = []
            for batch, state in batches:
                state.restore()
                losses.append(loss_and_metrics(member, batch)[0])
            loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
            if member.in_methods.due():
                evaluation.reject_bypasses(member, loss, own_parameters=False)
            return loss

        with preserved(member.devices, host=any(s.host is not None for _, s in batches)), self._autocast.restored():
            evaluation.add_responses(values, evaluation.graph.internal_order(member.name), self.name)
            with evaluation.bound(member, values, own_parameters=False, spare_buffers=True):
                yield evaluate

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

    def symmetry_check_due(self) -> bool:
        # The first solve is left as cheap as it can be; what trains makes many.
        self._member.directional_solves += 1
        return self._member.directional_solves == _CHECKED_SOLVE

    def record(self, report: SolveReport) -> None:
        self._evaluation.reports.append(report)


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


def title(member: Member) -> str:
    """Return how errors name the loss of a problem."""
    return f"problem {member.name!r}: training_step"


def loss_and_metrics(member: Member, batch: Any) -> tuple[Tensor, dict[str, float]]:
    """Evaluate a problem's loss on one batch, and take what it logs beside it."""
    versions = _versions(batch)
    result = member.problem.training_step(batch)
    if versions != _versions(batch):
        raise EvaluationError(
            f"{title(member)} changed its batch in place; expected a loss that only reads it, since a batch is used "
            "again when the stage's response is differentiated. Use an out-of-place operation, or clone() first."
        )
    if not isinstance(result, Mapping):
        return checked_loss(result, title(member)), {}
    if "loss" not in result:
        raise LossError(
            f"{title(member)} returned a dict with {', '.join(map(repr, result)) or 'nothing'}; "
            "expected the key 'loss'."
        )
    metrics = {key: number(value, f"{title(member)}, {key!r}") for key, value in result.items() if key != "loss"}
    return checked_loss(result["loss"], title(member)), metrics


def _versions(batch: Any) -> list[int]:
    return [t._version for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]


def number(value: object, what: str) -> float:
    """Return a logged value as a number."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise LossError(
            f"{what} returned {type(value).__name__}; expected a number or a tensor with one element to log."
        ) from None


@dataclass(frozen=True)
class TotalGradient:
    """A problem's loss and what its evaluation left in `.grad` of the leaves.

    Attributes:
        loss: mean over the batches.
        metrics: what the loss logs, likewise.
        micro_batches: the batches with the random states that the loss saw.
        used: the dependencies that the loss read.
        cut: those among them whose response carries a gradient, but not from this loss.

    """

    loss: float
    metrics: dict[str, float]
    micro_batches: list[MicroBatch]
    used: set[str]
    cut: set[str]


def accumulate_total_gradient(
    evaluation: Evaluation,
    member: Member,
    own: Sequence[Tensor],
    batches: Sequence[Any],
    states: Sequence[RandomState] | None,
) -> TotalGradient:
    """Put the total gradient of a problem's loss into `.grad` of `own`, which must be `None` before.

    `own` are the problem's parameters themselves (a training step, `states` is `None`: random draws go on,
    buffers change as in any forward pass) or fresh leaves in their place (`states` are replayed, buffers are
    spared).

    The direct gradient and the cotangents of all responses come from one backward pass per batch; the
    cotangents of all batches together then go through the response nodes, so that each stage is solved once.
    """
    graph, training = evaluation.graph, states is None
    shadow = leaves(own)
    # Only responses that depend on the problem itself can carry its gradient; all others are constants here.
    nodes = graph.internal_order(member.name)
    inner = evaluation.constants(set(graph.direct(member.name)).union(*map(graph.inputs, nodes)).difference(nodes))
    inner[member.name] = shadow
    evaluation.add_responses(inner, nodes, member.name)
    outputs = {d: inner[d] for d in graph.direct(member.name) if any(t.requires_grad for t in inner[d])}
    proxies = {d: leaves(tensors) for d, tensors in outputs.items()}
    values = {**inner, **proxies, member.name: tuple(own)}

    losses: list[float] = []
    logged: list[dict[str, float]] = []
    seen: list[MicroBatch] = []
    inputs = [*own, *(t for tensors in proxies.values() for t in tensors)]
    schedule = member.in_training if training else member.in_methods
    with evaluation.bound(member, values, own_parameters=training, spare_buffers=not training) as frame:
        for i, batch in enumerate(batches):
            if states is None:
                state, loss, metrics = _training_evaluation(member, batch)
            else:
                state = states[i]
                state.restore()
                loss, metrics = loss_and_metrics(member, batch)
            if not loss.requires_grad:
                raise without_graph(title(member), graph.why_no_gradient(member.name))
            if schedule.due():
                evaluation.reject_bypasses(member, loss, own_parameters=training)
                if i == 0:
                    _reject_hidden_gradients(member, own, bool(outputs))
            mean = loss if len(batches) == 1 else loss / len(batches)
            torch.autograd.backward([mean], inputs=inputs)
            seen.append((batch, state))
            losses.append(loss.item())
            logged.append(metrics)
    _propagate(outputs, proxies, shadow, own)
    reached = {d for d, tensors in proxies.items() if any(t.grad is not None for t in tensors)}
    if all(t.grad is None for t in own):
        raise unreached(title(member), graph.why_no_gradient(member.name))
    return TotalGradient(
        loss=sum(losses) / len(losses),
        metrics={
            key: sum(m[key] for m in logged if key in m) / sum(key in m for m in logged) for m in logged for key in m
        },
        micro_batches=seen,
        # A dependency may also be read through its module itself, which the frame does not see.
        used=frame.used | reached,
        cut=(frame.used & set(proxies)) - reached,
    )


def _training_evaluation(member: Member, batch: Any) -> tuple[RandomState, Tensor, dict[str, float]]:
    """Evaluate the loss of a training step, and find out whether it draws from Python's or NumPy's generator."""
    state = RandomState.capture(member.devices)
    loss, metrics = loss_and_metrics(member, batch)
    if not member.draws_from_host and state.host is not None:
        member.draws_from_host = not same_host_state(state.host, host_state())
    return state if member.draws_from_host else replace(state, host=None), loss, metrics


def _propagate(
    outputs: Mapping[str, Vector], proxies: Mapping[str, Vector], shadow: Vector, own: Sequence[Tensor]
) -> None:
    """Send the cotangents of the responses through their nodes and add the result to `.grad` of `own`."""
    pairs = [
        (output, proxy.grad)
        for d, tensors in outputs.items()
        for output, proxy in zip(tensors, proxies[d], strict=True)
        if output.requires_grad and proxy.grad is not None
    ]
    if not pairs:
        return
    torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs], inputs=list(shadow))
    for leaf, t in zip(own, shadow, strict=True):
        if t.grad is not None:
            leaf.grad = t.grad if leaf.grad is None else leaf.grad.add_(t.grad)
