"""The reverse sweep through solved stages as one function that `torch.compile` has made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.binding import SharedBinding
from mlo.frame import ParameterSlots
from mlo.hypergradient import HypergradientMethod
from mlo.links import Links
from mlo.member import Member, MicroBatch, cuda_devices
from mlo.outcome import Outcome, batch_versions, interpreted
from mlo.random_state import RandomState
from mlo.recurrence import Ending
from mlo.stage_function import StageFunction, leaves
from mlo.status import SolveReport
from mlo.traced import Derivatives, Found
from mlo.traced_pullback import TracedPullback
from mlo.traced_sweep import TracedStage, Values, pullback, total_gradient
from mlo.vectors import Vector

#: A sweep that its numbers send back is made anew without; where that is the rule, none is compiled.
ATTEMPTS = 4
# Up to how many evaluations and products, times tensors, one function is made of: the time that takes grows with them.
_LONGEST = 512


class StageRule(NamedTuple):
    """A stage of a sweep.

    Attributes:
        member: the stage.
        method: its hypergradient method.
        pullback: the method's backward rule.
        wanted: the problems among its inputs to which the sweep goes on.

    """

    member: Member
    method: HypergradientMethod
    pullback: TracedPullback
    wanted: tuple[Member, ...]


class _CompiledStages:
    """What one function of several stages has in common with one of a single one."""

    def __init__(self, head: Member, rules: Sequence[StageRule], others: Sequence[Member]) -> None:
        """Take the problem whose loss is the first that is evaluated, the stages, and what else their losses see."""
        self._rules = tuple(rules)
        self._evaluated = tuple(dict.fromkeys((head, *[rule.member for rule in rules])))
        self._members = tuple(dict.fromkeys((*self._evaluated, *others)))
        self._number = {m.name: i for i, m in enumerate(self._members)}
        self._differentiated = {m.name for rule in rules for m in (rule.member, *rule.wanted)}
        self._moved = {rule.member.name for rule in rules if rule.pullback.moves}
        above = len(self._evaluated) - len(self._rules)  # the loss above the stages, if there is one
        self._repeats = above + sum(rule.pullback.evaluations for rule in rules) > 1
        self._left = ATTEMPTS
        self._found: tuple[Any, ...] = ()

    def _refresh(self) -> None:
        """Take note of the present parameters, if they are others than the last ones."""
        found = tuple([m.slots for m in self._members])
        if found == self._found:
            return
        self._found = found
        placed, count = [], 0
        for m in self._members:
            placed.append((m.slots, count))
            count += len(m.trainable)
        self._slots, self._devices = ParameterSlots(placed), cuda_devices(self._evaluated)
        self._arguments: dict[int, tuple[Any, tuple[Any, ...]]] = {}
        self._short = sum(map(_length, self._rules)) <= _LONGEST

    @property
    def hopeful(self) -> bool:
        """Whether there will be further attempts."""
        return self._left > 0

    def possible(self, nodes: Sequence[StageFunction], batches: Sequence[Sequence[MicroBatch]]) -> bool:
        """Whether there is such a function, as far as is known."""
        if not (self.hopeful and self._evaluated[0].compiles):
            return False
        for m in self._evaluated:
            if m.host_draws.possible or m.compiled is None or m.compiled.failure is not None:
                return False
        self._refresh()
        if not self._short:
            return False
        for rule, node, given in zip(self._rules, nodes, batches, strict=True):
            if len(given) != 1 or not rule.pullback.allows(node, rule.member.trainable):
                return False
        return True

    def give_up(self) -> None:
        """Make no further attempts: what is not one function may be several."""
        self._left = 0

    @property
    def check_due(self) -> bool:
        """Whether the next evaluation of a stage is to be checked, which takes its graph."""
        return any(rule.member.in_methods.next_is_due for rule in self._rules)

    def _values(self, own: Mapping[str, Vector]) -> dict[str, Vector]:
        """Return the tensors that all losses see; those that are moved are copies."""
        values: dict[str, Vector] = {}
        for m in self._members:
            name = m.name
            if name in own:
                values[name] = own[name]
            elif name in self._moved:
                values[name] = tuple([t.detach().clone().requires_grad_() for t in m.trainable])
            elif name in self._differentiated:
                values[name] = leaves(m.trainable)
            else:
                values[name] = m.constants()
        return values

    def _traced(self, i: int, node: StageFunction, batch: Any) -> TracedStage:
        """Return a stage as the traced function takes it."""
        rule = self._rules[i]
        theta = rule.member.trainable
        numbers = node.learning_rates, node.weight_decays, node.signs, [(t.dtype, t.device) for t in theta]
        known, arguments = self._arguments.get(i, (None, ()))
        if known != numbers:
            arguments = rule.pullback.arguments(node, theta)
            self._arguments[i] = numbers, arguments
        wanted = tuple([self._number[m.name] for m in rule.wanted])
        own = self._number[rule.member.name]
        return TracedStage(rule.member.problem.training_step, batch, own, wanted, rule.pullback.run, arguments)

    def _call(
        self, batch: Any, derivatives: Derivatives, values: Mapping[str, Vector], nodes: Sequence[StageFunction]
    ) -> tuple[Any, Found, bool, set[str]] | None:
        """Return what the compiled function does, without its numbers, and what the first loss has read.

        The reports of the solves are recorded. `None` if all is to be made anew without: nothing has come of it.
        """
        head = self._evaluated[0]
        before = RandomState.capture(self._devices, whole=False)
        binding = SharedBinding(self._evaluated, self._members, self._slots, values)
        fixed = [t for name, tensors in values.items() if name not in self._moved for t in tensors]
        versions = [t._version for t in fixed], batch_versions(batch)
        with torch.enable_grad(), binding as frame:
            result, (*found, numbers), reached = head.compiled_loss(batch, derivatives)
        # Part by part, a loss that writes to what it is to read, or calls backward(), does less harm or is an error.
        written = versions != ([t._version for t in fixed], batch_versions(batch)) or _clear_gradients(values)
        if written or numbers is None or (self._repeats and (binding.wrote_buffers or before.moved())):
            before.restore()
            self.give_up()
            return None
        endings = self._endings(nodes, numbers.tolist())
        if endings is None:
            self._left -= 1
            return None
        self._left = ATTEMPTS
        for rule, node, (ending, distance) in zip(self._rules, nodes, endings, strict=True):
            rule.member.in_methods.count += 1
            if node.reports_solves:
                rule.method.settle(node, SolveReport(node.name, type(rule.method).__name__, *ending, distance))
        return result, tuple(found), reached, frame.used

    def _endings(
        self, nodes: Sequence[StageFunction], numbers: Sequence[float]
    ) -> list[tuple[Ending, float | None]] | None:
        """Return how each solve ended, from all numbers; `None` if one is to be left to its method."""
        endings = []
        begin = 0
        for rule, node in zip(self._rules, nodes, strict=True):
            middle = begin + rule.pullback.evaluations
            end = middle + rule.pullback.count
            losses, own = numbers[begin:middle], numbers[middle:end]
            begin = end
            if not all(map(math.isfinite, losses)):
                return None  # whose error names it
            ending = rule.pullback.ending(node, rule.member.trainable, losses, own)
            if ending is None:
                return None
            endings.append(ending)
        return endings


def _clear_gradients(values: Mapping[str, Vector]) -> bool:
    """Clear what a loss has left in `.grad`, where there was nothing; return whether there was any."""
    left = [t for tensors in values.values() for t in tensors if t.grad is not None]
    for t in left:
        t.grad = None
    return bool(left)


def _length(rule: StageRule) -> int:
    tensors = sum(len(m.trainable) for m in (rule.member, *rule.wanted))
    return (rule.pullback.evaluations + rule.pullback.steps) * tensors


class CompiledTotal(_CompiledStages):
    """The total gradient of one problem's loss as one function: the loss, its gradients, and the whole sweep.

    Attributes:
        stages: the stages of the sweep, highest first.

    """

    def __init__(self, head: Member, rules: Sequence[StageRule], links: Links) -> None:
        """Compile nothing before the first call."""
        super().__init__(head, rules, (*links.proxied, *links.constant))
        self.stages = tuple([rule.member for rule in rules])
        self._head = head
        self._differentiated.add(head.name)
        self._read = tuple([self._number[m.name] for m in links.proxied])

    def __call__(
        self,
        own: Vector,
        batch: Any,
        nodes: Sequence[StageFunction],
        batches: Sequence[Sequence[MicroBatch]],
    ) -> tuple[Outcome, set[str]] | None:
        """Return the loss with its total gradient in `own`, and what it has read; `None` if it is to be found without.

        Args:
            own: the problem's parameters, or leaves in their place.
            batch: that of its loss.
            nodes: the stages, in order.
            batches: the batches of each, with their random states.

        Raises:
            CannotCompileError: nothing was evaluated. If the losses themselves are not at fault, say `give_up`.
            LossError: as for any evaluation of the loss.

        """
        values = self._values({self._head.name: own})
        stages = tuple([self._traced(i, node, batches[i][0][0]) for i, node in enumerate(nodes)])
        each: Values = tuple([values[m.name] for m in self._members])
        done = self._call(batch, total_gradient(each, self._read, stages), values, nodes)
        if done is None:
            return None
        result, found, reached, used = done
        return interpreted(self._head, result, found, reached), used


class CompiledPullback(_CompiledStages):
    """The pullback of one stage as one function."""

    def __init__(self, rule: StageRule, links: Links) -> None:
        """Compile nothing before the first call; `links` are those around the stage."""
        super().__init__(rule.member, (rule,), links.inputs)

    def __call__(
        self, node: StageFunction, cotangents: Sequence[Tensor | None], batches: Sequence[MicroBatch]
    ) -> Found | None:
        """Return the cotangents of the wanted inputs, one after the other; `None` if they are to be found without.

        Raises:
            CannotCompileError: nothing was evaluated. If the loss itself is not at fault, say `give_up`.

        """
        if not self.possible((node,), (batches,)) or self.check_due:
            return None
        values = self._values({})
        each: Values = tuple([values[m.name] for m in self._members])
        ((batch, state),) = batches
        state.restore()
        done = self._call(batch, pullback(each, tuple(cotangents), self._traced(0, node, batch)), values, (node,))
        return None if done is None else tuple([t.to_dense() if t is not None and t.is_sparse else t for t in done[1]])


@dataclass(frozen=True)
class CompiledSweep:
    """What of the total gradient of one problem's loss may be compiled as one function.

    Attributes:
        total: all of it, if that may be.
        pullbacks: those of single stages, by name.

    """

    total: CompiledTotal | None
    pullbacks: Mapping[str, CompiledPullback]


def compiled_sweeps(links: Mapping[str, Links], members: Mapping[str, Member]) -> dict[str, CompiledSweep]:
    """Return those of all problems whose gradient goes through stages with a compiled pullback."""
    found: dict[str, CompiledSweep] = {}
    for name, head in members.items():
        own = links[name]
        rules = [_rule(links[m.name], m, [members[q] for q, wanted in sources if wanted]) for m, sources in own.sweep]
        known = [rule for rule in rules if rule is not None]
        if not known:
            continue
        compiled = head.problem.compile
        # Batches that are drawn for solves are drawn once the loss has been evaluated, and if it reads the stage.
        whole = compiled is not None and all(
            r is not None and r.member.problem.compile == compiled and r.member.solve_feed is None for r in rules
        )
        found[name] = CompiledSweep(
            CompiledTotal(head, known, own) if whole else None,
            {rule.member.name: CompiledPullback(rule, links[rule.member.name]) for rule in known},
        )
    return found


def _rule(links: Links, member: Member, wanted: Sequence[Member]) -> StageRule | None:
    # Torch does not trace the nodes of responses that a stage's own loss holds.
    rule = None if member.compiled is None or links.nested else links.method.traced_pullback()
    return None if rule is None else StageRule(member, links.method, rule, tuple(wanted))
