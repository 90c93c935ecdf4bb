"""A problem as the engine handles it: its parameters, their places, its data and where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from mlo.compiled_loss import CompiledLoss, switched_off
from mlo.data_feed import DataFeed
from mlo.frame import Frame, ModuleSlots, ParameterNames, ParameterSlots
from mlo.optimizer_facts import OptimizerFacts
from mlo.problem import Problem
from mlo.random_state import HostDraws, RandomState
from mlo.recording import Recording
from mlo.traced import Derivatives, Traced
from mlo.vectors import Vector

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)

#: A batch and the random state in which the loss was evaluated on it.
MicroBatch = tuple[Any, RandomState]


def cuda_devices(members: Iterable[Member]) -> tuple[torch.device, ...]:
    """Return the devices on which the problems' losses may draw from generators of their own."""
    return tuple(dict.fromkeys([d for m in members for d in m.cuda_devices]))


class CheckSchedule:
    """Evaluations 1, 2, 4, 8, … of a loss: often enough to find a change in what it does, at a cost that vanishes."""

    def __init__(self) -> None:
        """Start before the first evaluation."""
        self.count = 0

    def due(self) -> bool:
        """Count one evaluation, and return whether it is to be checked."""
        self.count += 1
        return self.count & (self.count - 1) == 0

    @property
    def next_is_due(self) -> bool:
        """Whether the next evaluation is to be checked."""
        return self.count & (self.count + 1) == 0


class Member:
    """What the engine keeps for one problem.

    Attributes:
        problem: the user's problem.
        parameters: all parameters of its module by name, tied ones once.
        names: the names of all of them, of the trainable ones (those with `requires_grad` that the optimizer
            holds), and the others.
        trainable: the trainable parameters themselves.
        slots: their places in the module.
        slots_seen: those of all problems in `seen`.
        slots_read: those of all but the problem itself.
        facts: what the optimizer says about them.
        held: all parameters that the optimizer holds, those outside of `trainable` too.
        devices: the devices of the parameters.
        cuda_devices: those among them that have random generators of their own.
        device_types: their types, each once.
        feed: the problem's batches.
        micro_batches: those of its last step.
        recording: its last optimizer steps, if a method wants them.
        solve_feed: where the batches for solves come from if they are not those of the last step, else `None`.
        solve_micro_batches: the last ones that came from there.
        fresh: whether the problem is solved for the present values of the problems above.
        has_stepped: whether it has taken an optimizer step in this engine.
        in_training: when its loss is checked for what users must not do in it, in training steps.
        in_methods: likewise, inside hypergradient methods.
        in_doubt: likewise, where it was very different on both sides of a difference: whether it is the same function.
        directional_solves: how often mixed products of its loss were taken as directional derivatives.
        differences: how often by central differences, with these parameters.
        asks_for_gradients: whether the loss is another one where the problem's parameters need no gradient, or may be.
        options_seen: how often its fixed options had been set when they were last compared with the engine's.
        host_draws: whether its loss draws from Python's or NumPy's generator.
        compiled: the loss with its gradient as one compiled function, if the problem asks for it.
        title: how errors name its loss.
        seen: the problem itself, and then those that its loss reads, by name, in the order of the graph.

    """

    def __init__(self, problem: Problem) -> None:
        """Find everything that can be known beforehand."""
        self.problem = problem
        self.name = problem.name
        self.feed = DataFeed(problem.name, problem.data)
        self.micro_batches: list[MicroBatch] | None = None
        self.solve_micro_batches: list[MicroBatch] | None = None
        self._own_solve_feed = None if problem.solve_data is None else DataFeed(problem.name, problem.solve_data)
        self.fresh = False
        self.has_stepped = False
        self.directional_solves = 0
        self.options_seen = problem._options_set
        self.host_draws = HostDraws()
        self.title = f"problem {problem.name!r}: training_step"
        self.compiled = None if problem.compile is None else CompiledLoss(self.title, problem.compile)
        self._find_parameters()
        self.see({self.name: self})

    def see(self, seen: Mapping[str, Member]) -> None:
        """Take note of what the loss sees, or of the places of the same problems once they were found anew."""
        self.seen = seen
        placed, count = [], 0
        for m in seen.values():
            placed.append((m.slots, count))
            count += len(m.trainable)
        self.slots_seen, self.slots_read = ParameterSlots(placed), ParameterSlots(placed[1:])

    @property
    def solve_feed(self) -> DataFeed | None:
        """Where the batches for solves come from if they are not those of the last step."""
        return self._own_solve_feed or (None if self.problem.solve_batches is None else self.feed)

    @property
    def solve_count(self) -> int:
        """How many batches a solve takes from `solve_feed`."""
        return self.problem.solve_batches or 1

    def refresh(self) -> bool:
        """Find the parameters anew if one was frozen, unfrozen or replaced; return whether that was so."""
        if self._as_found():
            return False
        self._find_parameters()
        return True

    @property
    def compiles(self) -> bool:
        """Whether evaluations that are no checks are to be compiled, as far as is known."""
        if self.compiled is None or self.compiled.failure is not None or switched_off():
            return False
        return not any(getattr(torch_modules, name) for name in _GLOBAL_HOOKS)  # which compiled code would not run

    def compiled_loss(self, batch: Any, derivatives: Derivatives) -> Traced:
        """Return what `training_step` returns, derivatives of the loss, and whether it has any, from compiled code."""
        assert self.compiled is not None, self.name
        frame = self.problem._frame
        assert frame is not None, self.name
        self.prepare(frame)
        used, frame.used = frame.used, set()
        try:
            return self.compiled(self.problem.training_step, batch, derivatives)
        finally:
            frame.used |= used

    def prepare(self, frame: Frame) -> None:
        """Make all that a loss would make when it first asks: compiled, it would be another function the next time."""
        for name in self.seen:
            frame.parameters(name)
        self.problem.deps.prepare()

    def constants(self) -> Vector:
        """Return the present values of the trainable parameters as constants."""
        return tuple([p.detach() for p in self.trainable])

    def _as_found(self) -> bool:
        """Whether the same parameters are trainable, and still are where they were found."""
        for p, flag in self._flags:
            if p.requires_grad is not flag:
                return False
        trainable = self.trainable
        for places, key, i in self.slots.places:
            if places.get(key) is not trainable[i]:
                return False
        optimizer = self.problem.optimizer
        return optimizer is None or self._group_sizes == [len(group["params"]) for group in optimizer.param_groups]

    def _find_parameters(self) -> None:
        named = dict(self.problem.module.named_parameters())
        optimizer = self.problem.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        self.held: list[torch.Tensor] = [p for group in groups for p in group["params"]]
        held = None if optimizer is None else set(map(id, self.held))
        self.parameters = named
        self.names = ParameterNames(
            named, [n for n, p in named.items() if p.requires_grad and (held is None or id(p) in held)]
        )
        self.trainable: tuple[nn.Parameter, ...] = tuple(named[n] for n in self.names.trainable)
        self.slots = ModuleSlots(self.problem.module, self.trainable)
        self.facts = OptimizerFacts(optimizer, self.trainable)
        self.devices: tuple[torch.device, ...] = tuple(dict.fromkeys(p.device for p in named.values()))
        self.cuda_devices = tuple(d for d in self.devices if d.type == "cuda")
        self.device_types: tuple[str, ...] = tuple(dict.fromkeys(d.type for d in self.devices))
        self._flags = [(p, p.requires_grad) for p in named.values()]
        self._group_sizes = [len(group["params"]) for group in groups]
        self.differences, self.asks_for_gradients = 0, True
        self.in_training, self.in_methods, self.in_doubt = CheckSchedule(), CheckSchedule(), CheckSchedule()
        self.recording: Recording[list[MicroBatch]] | None = None
