"""The total gradient of one problem's loss: the direct part, and the reverse sweep over the responses that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlo.errors import EvaluationError
from mlo.evaluation import Binding, Evaluation, loss_and_metrics, replayed
from mlo.losses import unreached, without_graph
from mlo.member import Member, MicroBatch
from mlo.random_state import RandomState, preserved
from mlo.response import pulled_back
from mlo.stage_function import leaves
from mlo.vectors import Vector


@dataclass(frozen=True)
class TotalGradient:
    """A problem's loss and what its evaluation left in `.grad` of the leaves.

    Attributes:
        loss: mean over the batches.
        metrics: what the loss logs, likewise.
        micro_batches: the batches with the random states that the loss saw, if it is to be repeatable.
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
    *,
    repeatable: bool = True,
) -> TotalGradient:
    """Put the total gradient of a problem's loss into `.grad` of `own`, which must be `None` before.

    `own` are the problem's parameters themselves (a training step, `states` is `None`: random draws go on,
    buffers change as in any forward pass) or fresh leaves in their place (`states` are replayed, buffers are
    spared). A training step that is not to be `repeatable` takes no note of its batches and random states.

    The direct gradient and the cotangents of all responses come from one backward pass per batch; the
    cotangents of all batches together then go back through the responses, so that each stage is solved once.
    """
    graph, training = evaluation.graph, states is None
    carrying = graph.carrying(member.name)
    proxies = {d: leaves(evaluation.members[d].trainable) for d in graph.direct(member.name) if d in carrying}
    values = {**evaluation.constants(d for d in graph.seen(member.name) if d not in proxies), **proxies}
    values[member.name] = tuple(own)

    losses: list[float] = []
    logged: list[dict[str, float]] = []
    seen: list[MicroBatch] = []
    inputs = [*own, *(t for tensors in proxies.values() for t in tensors)]
    schedule = member.in_training if training else member.in_methods
    with Binding(member, values, own_parameters=training, spare_buffers=not training) as frame:
        for i, batch in enumerate(batches):
            if states is None:
                loss, metrics = _training_evaluation(member, batch, seen if repeatable else None)
            else:
                seen.append((batch, states[i]))
                loss, metrics = replayed(member, batch, states[i])
            if not loss.requires_grad:
                raise without_graph(member.title, graph.why_no_gradient(member.name))
            if schedule.due():
                evaluation.reject_bypasses(member, loss, own_parameters=training)
                if i == 0:
                    _reject_hidden_gradients(member, own, bool(proxies))
            mean = loss if len(batches) == 1 else loss / len(batches)
            torch.autograd.backward(mean, inputs=inputs)
            losses.append(loss.item())
            logged.append(metrics)
    cotangents = {d: [t.grad for t in tensors] for d, tensors in proxies.items()}
    reached = {d for d, found in cotangents.items() if _any(found)}
    if reached:
        _sweep(evaluation, member, values, cotangents, own)
    if not _any([t.grad for t in own]):
        raise unreached(member.title, graph.why_no_gradient(member.name))
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


def _training_evaluation(member: Member, batch: Any, seen: list[MicroBatch] | None) -> tuple[Tensor, dict[str, float]]:
    """Evaluate the loss of a training step, and add to `seen` with which random state it is to be repeated."""
    if seen is None:
        return loss_and_metrics(member, batch)
    state, before = RandomState.capture(member.devices, host=False), member.host_draws.before()
    result = loss_and_metrics(member, batch)
    host = member.host_draws.after(before)
    seen.append((batch, state if host is None else state._replace(host=host)))
    return result


def _sweep(
    evaluation: Evaluation,
    member: Member,
    values: Mapping[str, Vector],
    cotangents: dict[str, list[Tensor | None]],
    own: Sequence[Tensor],
) -> None:
    """Send cotangents back through the responses, each once all of its own are there, and add the result to `.grad`.

    It is the reverse sweep of autograd over the graph of stages, written out: no result is to be differentiated again,
    so that no node need be made.
    """
    graph = evaluation.graph
    carrying = graph.carrying(member.name)
    stages = [evaluation.members[d] for d in graph.responses(member.name)]
    devices = dict.fromkeys([d for m in stages for d in m.devices])
    # Every evaluation of a stage in there replays the draws of its last step.
    with torch.no_grad(), preserved(devices, host=any(m.host_draws.found for m in stages)):
        for name in reversed(carrying):
            given = cotangents.pop(name, None)
            if given is None or not _any(given):
                continue
            names = graph.inputs(name)
            inputs = [t for q in names for t in values[q]]
            needed = [q == member.name or q in carrying for q in names for _ in values[q]]
            stage = evaluation.stage(name, member.name)
            found = pulled_back(stage, graph.method(name), given, values[name], inputs, needed)
            begin = 0
            for q in names:
                end = begin + len(values[q])
                arrived, before = list(found[begin:end]), cotangents.get(q)
                cotangents[q] = arrived if before is None else list(map(_sum, before, arrived))
                begin = end
        for leaf, c in zip(own, cotangents.get(member.name) or [None] * len(own), strict=True):
            if c is not None:
                # A copy, since a method may hand out one tensor twice, or one whose entries share memory.
                leaf.grad = c.clone() if leaf.grad is None else leaf.grad.add_(c)


def _any(found: Sequence[Tensor | None]) -> bool:
    for t in found:  # noqa: SIM110  (a generator takes longer)
        if t is not None:
            return True
    return False


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


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
