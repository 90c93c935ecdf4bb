"""A problem as the engine handles it: its parameters, their places, its data and where it stands."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mlo.data_feed import DataFeed
from mlo.frame import ModuleSlots
from mlo.optimizer_facts import OptimizerFacts
from mlo.problem import Problem
from mlo.random_state import RandomState

#: A batch and the random state in which the loss was evaluated on it.
MicroBatch = tuple[Any, RandomState]


class Member:
    """What the engine keeps for one problem.

    Attributes:
        problem: the user's problem.
        parameters: all parameters of its module by name, tied ones once.
        names: the names of the trainable ones: those with `requires_grad` that the optimizer holds.
        trainable: these themselves.
        slots: their places in the module.
        facts: what the optimizer says about them.
        devices: the devices of the parameters.
        feed: the problem's batches.
        micro_batches: those of its last step, the ones that its response is differentiated on.
        fresh: whether the problem is solved for the present values of the problems above.
        checked_in_training: whether its loss has been searched once for parameters that it reaches past
            their binding, in a training step.
        checked_in_methods: likewise, inside a hypergradient method.
        draws_from_host: whether its loss has been seen to draw from Python's or NumPy's generator.
        evaluations: how often its loss has been evaluated in training.

    """

    def __init__(self, problem: Problem) -> None:
        """Find everything that can be known beforehand."""
        self.problem = problem
        self.name = problem.name
        self.feed = DataFeed(problem.name, problem.data)
        self.micro_batches: list[MicroBatch] | None = None
        self.fresh = False
        self.checked_in_training = False
        self.checked_in_methods = False
        self.draws_from_host = False
        self.evaluations = 0
        self._signature: object = None
        self.refresh()

    def refresh(self) -> bool:
        """Find the parameters anew if one was frozen, unfrozen or replaced; return whether that was so."""
        named = dict(self.problem.module.named_parameters())
        optimizer = self.problem.optimizer
        held = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = tuple(n for n, p in named.items() if p.requires_grad and (held is None or id(p) in held))
        signature = (names, tuple(map(id, named.values())))
        if self._signature == signature:
            return False
        self._signature = signature
        self.parameters = named
        self.names = names
        self.trainable: tuple[nn.Parameter, ...] = tuple(named[n] for n in names)
        self.constant: dict[str, nn.Parameter] = {n: p for n, p in named.items() if n not in set(names)}
        self.slots = ModuleSlots(self.problem.module, self.trainable)
        self.facts = OptimizerFacts(optimizer, self.trainable)
        self.devices: tuple[torch.device, ...] = tuple(dict.fromkeys(p.device for p in named.values()))
        return True
