"""The total gradient of one problem's loss: the direct part, and the reverse sweep over the responses that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.binding import Binding
from mlo.compiled_loss import CannotCompileError
from mlo.compiled_sweep import CompiledTotal
from mlo.errors import EvaluationError
from mlo.evaluation import Evaluation
from mlo.links import Links
from mlo.losses import unreached, without_graph
from mlo.member import Member, MicroBatch, cuda_devices
from mlo.memory import alone, laid_out, separate_gradients
from mlo.outcome import Outcome, outcome, replayed
from mlo.random_state import Preserved, RandomState
from mlo.response import pulled_back
from mlo.reverse_pass import accumulate
from mlo.stage_function import leaves
from mlo.traced import Derivatives, gradient
from mlo.vectors import Vector


class TotalGradient(NamedTuple):
    """A problem's loss and what its evaluation left in `.grad` of the leaves.

    Attributes:
        loss: mean over the batches.
        metrics: what the loss logs, likewise.
        micro_batches: the batches with the random states that the loss saw, if it is to be repeatable.
        used: the dependencies that the loss asked for.
        reached: those whose response got a cotangent: one may also be read through its module itself.

    """

    loss: float
    metrics: dict[str, float]
    micro_batches: list[MicroBatch]
    used: set[str]
    reached: tuple[str, ...]


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
    sweep = evaluation.sweeps.get(member.name)
    whole = sweep.total if sweep is not None and len(batches) == 1 else None
    if whole is None:
        return _in_parts(evaluation, member, own, batches, states, repeatable=repeatable)
    try:
        done = _as_one(whole, evaluation, member, own, batches[0], training=states is None)
        refused = False
    except CannotCompileError:
        done, refused, evaluation.eager = None, True, True
    if done is None:
        done = _in_parts(evaluation, member, own, batches, states, repeatable=repeatable)
    if refused:
        whole.give_up()  # since the losses, which have raised nothing now, are not at fault
    return done


def _in_parts(
    evaluation: Evaluation,
    member: Member,
    own: Sequence[Tensor],
    batches: Sequence[Any],
    states: Sequence[RandomState] | None,
    *,
    repeatable: bool,
) -> TotalGradient:
    """Evaluate the loss on one batch after the other, and then go back through one stage after the other."""
    links, training = evaluation.links[member.name], states is None
    values = {m.name: m.constants() for m in links.constant}
    inputs = list(own)
    for m in links.proxied:
        proxies = values[m.name] = leaves(m.trainable)
        inputs += proxies
    values[member.name] = tuple(own)

    losses: list[float] = []
    logged: list[dict[str, float]] = []
    seen: list[MicroBatch] = []
    schedule = member.in_training if training else member.in_methods
    with Binding(member, values, own_parameters=training, spare_buffers=not training) as frame:
        for i, batch in enumerate(batches):
            due = schedule.due()
            # Checks look at the graph, which compiled code does not make, and hooks of parameters are run by autograd.
            plain = due or evaluation.eager or not member.compiles or any(map(_hooked, own))
            state = None if states is None else states[i]
            found = _evaluated(member, batch, state, seen if repeatable else None, None if plain else tuple(inputs))
            loss = found.loss
            if not (loss.requires_grad if found.derivatives is None else found.has_derivatives):
                raise without_graph(member.title, evaluation.graph.why_no_gradient(member.name))
            if due:
                evaluation.reject_bypasses(member, loss, own_parameters=training)
                if i == 0:
                    _reject_hidden_gradients(member, own, bool(links.proxied))
            _add_gradients(found, inputs, len(batches))
            losses.append(loss.item())
            logged.append(found.metrics)
    cotangents = _arrived(links.proxied, values)
    reached = tuple(cotangents)
    if cotangents:
        # Outside of training the caller has taken care of the generators.
        with _draws_preserved(links) if training else nullcontext():
            _sweep(evaluation, member, values, cotangents, own)
    if not _any([t.grad for t in own]):
        raise unreached(member.title, evaluation.graph.why_no_gradient(member.name))
    return TotalGradient(sum(losses) / len(losses), _means(logged), seen, frame.used, reached)


def _as_one(
    whole: CompiledTotal, evaluation: Evaluation, member: Member, own: Sequence[Tensor], batch: Any, *, training: bool
) -> TotalGradient | None:
    """Do all of it by one compiled function, if there is one and nothing is to be looked at more closely."""
    schedule = member.in_training if training else member.in_methods
    if schedule.next_is_due or whole.check_due:
        # To compile the parts for this once would take longer than to run them.
        evaluation.eager = whole.hopeful
        return None
    nodes = [evaluation.stage(stage, member.name) for stage in whole.stages]
    drawn = [evaluation.batches(stage) for stage in whole.stages]
    if any(map(_hooked, own)) or not whole.possible(nodes, drawn):
        return None
    state = RandomState.capture(member.cuda_devices, host=False) if training else None
    done = whole(tuple(own), batch, nodes, drawn)
    if done is None:
        evaluation.eager = whole.hopeful
        return None
    schedule.count += 1
    found, used = done
    if not found.has_derivatives:
        raise without_graph(member.title, evaluation.graph.why_no_gradient(member.name))
    _add_gradients(found, own, 1)
    if not _any([t.grad for t in own]):
        raise unreached(member.title, evaluation.graph.why_no_gradient(member.name))
    reached = tuple([m.name for m in evaluation.links[member.name].proxied])
    seen = [] if state is None else [(batch, state)]
    return TotalGradient(found.loss.item(), found.metrics, seen, used, reached)


def _add_gradients(found: Outcome, inputs: Sequence[Tensor], batches: int) -> None:
    """Add the gradient of one of the batches to `.grad` of the inputs, of which the loss is the mean."""
    if found.derivatives is not None:
        for t, g in zip(inputs, found.derivatives, strict=True):
            if g is not None:
                share = g if batches == 1 else g / batches
                t.grad = laid_out(share if t.grad is None else t.grad + share, t)
    elif batches == 1:
        accumulate(found.loss, inputs)
    else:
        accumulate(found.loss / batches, inputs)
        separate_gradients(inputs)  # since those of the next batch are added in place


def _arrived(proxied: Iterable[Member], values: Mapping[str, Vector]) -> dict[str, list[Tensor | None]]:
    """Return the cotangents of those responses that got any."""
    cotangents: dict[str, list[Tensor | None]] = {}
    for m in proxied:
        found = [t.grad for t in values[m.name]]
        if _any(found):
            cotangents[m.name] = found
    return cotangents


def _means(logged: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each logged number over the batches that have it."""
    if len(logged) == 1:
        return logged[0]
    means: dict[str, float] = {}
    for metrics in logged:
        for key in metrics:
            found = [m[key] for m in logged if key in m]
            means[key] = sum(found) / len(found)
    return means


def _evaluated(
    member: Member, batch: Any, state: RandomState | None, seen: list[MicroBatch] | None, compiled_at: Vector | None
) -> Outcome:
    """Evaluate the loss, with its gradient if there is a place for it and torch can compile it."""

    def evaluated(compiled: Derivatives | None) -> Outcome:
        if state is None:
            return _training_evaluation(member, batch, seen, compiled)
        result = replayed(member, batch, state, compiled=compiled)
        if seen is not None:
            seen.append((batch, state))
        return result

    if member.compiled is None or compiled_at is None:
        return evaluated(None)
    try:
        return evaluated(gradient(compiled_at))
    except CannotCompileError as error:
        result = evaluated(None)
        member.compiled.give_up(error)
        return result


def _training_evaluation(
    member: Member, batch: Any, seen: list[MicroBatch] | None, compiled: Derivatives | None
) -> Outcome:
    """Evaluate the loss of a training step, and add to `seen` with which random state it is to be repeated."""
    if seen is None:
        return outcome(member, batch, compiled=compiled)
    state, before = RandomState.capture(member.cuda_devices, host=False), member.host_draws.before()
    result = outcome(member, batch, compiled=compiled)
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
    links = evaluation.links[member.name]
    with torch.set_grad_enabled(False):  # as torch.no_grad(), in half its time
        for stage, sources in links.sweep:
            given = cotangents.pop(stage.name, None)
            if given is not None and _any(given):
                _pull_back(evaluation, member, values, cotangents, given, stage, sources)
    found = cotangents.get(member.name)
    if found is None:
        return
    for leaf, c in zip(own, found, strict=True):
        if c is None:
            continue
        if leaf.grad is not None:
            leaf.grad = leaf.grad.add_(c) if alone(leaf.grad) else c + leaf.grad
        else:
            # Optimizers write to it, and a method may hand out one tensor twice, or one whose entries share memory.
            leaf.grad = c if links.hands_over else c.clone()


def _draws_preserved(links: Links) -> Preserved:
    """Leave the generators as they were over a sweep, in which each stage replays the draws of its last step."""
    host = any(stage.host_draws.found for stage in links.responses)
    return Preserved(cuda_devices(links.responses), host=host)


def _pull_back(
    evaluation: Evaluation,
    member: Member,
    values: Mapping[str, Vector],
    cotangents: dict[str, list[Tensor | None]],
    given: Sequence[Tensor | None],
    stage: Member,
    sources: Iterable[tuple[str, bool]],
) -> None:
    """Send the cotangent `given` of a stage's response back to its `sources`, and add the results to theirs."""
    node, method = evaluation.stage(stage, member.name), evaluation.links[stage.name].method
    sweep = evaluation.sweeps.get(member.name)
    compiled = None if sweep is None or evaluation.eager else sweep.pullbacks.get(stage.name)
    refused = False
    if compiled is not None:
        try:
            done = compiled(node, given, evaluation.batches(stage))
        except CannotCompileError:
            done, refused = None, True
        if done is not None:
            _distribute(done, [(name, wanted) for name, wanted in sources if wanted], values, cotangents)
            return
    inputs: list[Tensor] = []
    needed: list[bool] = []
    for name, wanted in sources:
        tensors = values[name]
        inputs += tensors
        needed += [wanted] * len(tensors)
    if method.uses_up_cotangents and evaluation.links[member.name].hands_over:
        # They come from a backward pass of this gradient's own, or from methods above that keep nothing.
        node.disposable_cotangents = True
        for t in values[stage.name]:
            t.grad = None  # which would be something else afterwards
    found = pulled_back(node, method, given, values[stage.name], inputs, needed)
    if compiled is not None and refused:
        compiled.give_up()  # as above
    _distribute(found, sources, values, cotangents)


def _distribute(
    found: Sequence[Tensor | None],
    sources: Iterable[tuple[str, bool]],
    values: Mapping[str, Vector],
    cotangents: dict[str, list[Tensor | None]],
) -> None:
    """Add what a stage sends back to what its sources have got from others."""
    begin = 0
    for name, wanted in sources:
        end = begin + len(values[name])
        if wanted:
            arrived, before = found[begin:end], cotangents.get(name)
            cotangents[name] = list(arrived if before is None else map(_sum, before, arrived))
        begin = end


def _any(found: Sequence[Tensor | None]) -> bool:
    for t in found:  # noqa: SIM110  (a generator takes longer)
        if t is not None:
            return True
    return False


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _hooked(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _reject_hidden_gradients(member: Member, own: Sequence[Tensor], has_responses: bool) -> None:
    """Raise an error for what would make `.grad` something else than the total gradient."""
    for name, p in zip(member.names.trainable, own, strict=True):
        if p.grad is not None:
            raise EvaluationError(
                f"the loss of problem {member.name!r} left a gradient in the parameter {name!r}; expected a loss that "
                "calls no backward(): the engine does, and would count it twice. For a gradient inside the loss use "
                "torch.autograd.grad(..., create_graph=True)."
            )
        if has_responses and _hooked(p):
            raise EvaluationError(
                f"the parameter {name!r} of problem {member.name!r} has a gradient hook, which would see the direct "
                "gradient and the one through the responses one after the other instead of their sum; expected none. "
                "Use grad_clip=, or a pre-step hook of the optimizer (register_step_pre_hook)."
            )
