"""What a torch optimizer says about the stationary point that it moves to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import optim

from mlo.errors import MloWarning

# Optimizers of torch whose weight_decay is added to the gradient (L2), unless a group says that it is decoupled.
_L2_DECAY = (
    optim.ASGD,
    optim.Adadelta,
    optim.Adagrad,
    optim.Adam,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.SGD,
)
_DECOUPLED_DECAY = tuple(getattr(optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(optim, name))


class OptimizerFacts:
    """The learning rate, L2 decay and direction of an optimizer for each of some parameters.

    They are read from the parameter groups at each call, since schedulers change them.

    An L2 penalty that the optimizer adds to the gradient belongs to the loss that it minimises. Decoupled
    decay (AdamW) moves to a point that is stationary for no loss: the loss without it is taken instead.
    """

    def __init__(self, optimizer: optim.Optimizer | None, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Find each parameter's group."""
        self._optimizer = optimizer
        self._count = len(parameters)
        self._adds_decay = isinstance(optimizer, _L2_DECAY) and not isinstance(optimizer, _DECOUPLED_DECAY)
        self._index: list[int] = []
        if optimizer is not None:
            index = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
            self._index = [index[id(p)] for p in parameters]
        self._one_group = len(set(self._index)) == 1

    def _each(self, of: Callable[[dict[str, Any]], float], optimizer: optim.Optimizer) -> tuple[float, ...]:
        # By index: load_state_dict makes new group dictionaries.
        groups = optimizer.param_groups
        if self._one_group:
            return (of(groups[self._index[0]]),) * self._count
        return tuple([of(groups[i]) for i in self._index])

    @property
    def learning_rates(self) -> tuple[float, ...] | None:
        """The learning rate of each parameter, or `None` without an optimizer."""
        return None if self._optimizer is None else self._each(_learning_rate, self._optimizer)

    @property
    def weight_decays(self) -> tuple[float, ...]:
        """The coefficient of the L2 penalty for each parameter."""
        if self._optimizer is not None and self._adds_decay:
            for group in self._optimizer.param_groups:
                if group.get("weight_decay"):
                    return self._each(_weight_decay, self._optimizer)
        return (0.0,) * self._count

    @property
    def signs(self) -> tuple[float, ...]:
        """−1 for each parameter along which the loss is maximised, else 1."""
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                if group.get("maximize"):
                    return self._each(_sign, self._optimizer)
        return (1.0,) * self._count


def _learning_rate(group: dict[str, Any]) -> float:
    return float(group["lr"])


def _weight_decay(group: dict[str, Any]) -> float:
    return 0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay", 0.0))


def _sign(group: dict[str, Any]) -> float:
    return -1.0 if group.get("maximize") else 1.0


def warn_of_unknown_decay(problem: str, optimizer: optim.Optimizer | None) -> None:
    """Warn of a weight decay of which it is not known whether it belongs to the loss."""
    if optimizer is None or isinstance(optimizer, (*_L2_DECAY, *_DECOUPLED_DECAY)):
        return
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        warnings.warn(
            f"problem {problem!r}: {type(optimizer).__name__} is no optimizer of torch, so it is not known whether its "
            "weight_decay is an L2 penalty; hypergradients take the loss without it. If it is one, set weight_decay to "
            "0 and add the penalty to the loss.",
            MloWarning,
            stacklevel=3,
        )
