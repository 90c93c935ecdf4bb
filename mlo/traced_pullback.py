"""The backward rule of a stage as arithmetic of a known length, which compiled code can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.recurrence import Ending, Recurrence
from mlo.stage_function import StageFunction
from mlo.traced import Found, length, numbers_as_tensors, slopes, times, wide
from mlo.vectors import SAFE_LENGTHS, Vector

# Up to how many steps, times parameters, a solve is compiled as a whole: the time that takes grows with them.
MOST_STEPS, _LONGEST_SOLVE = 20, 128


class TracedResult(NamedTuple):
    """What a pullback in terms that torch.compile can trace gives.

    Attributes:
        found: the cotangents of the inputs, `None` where the loss does not reach.
        numbers: 0-dim tensors by which it is seen how it went, `TracedPullback.count` of them.

    """

    found: Found
    numbers: list[Tensor]


class TracedPullback(ABC):
    """How a method's `pullback` goes if nothing ends it early.

    A compiled function of losses and of pullbacks takes no more than the arithmetic: no autograd, no Python between two
    products, no waiting for a number. How they went is read from their numbers afterwards; what `pullback` would have
    ended early, or warned of, is left to it.

    Attributes:
        evaluations: how often it evaluates the loss.
        steps: how many products with the Hessian it forms.
        count: how many numbers it gives.
        moves: whether it evaluates the loss at other parameters, written for a while to the tensors that the loss sees.

    """

    evaluations: int
    steps: int
    count: int
    moves: bool

    @staticmethod
    @abstractmethod
    def run(
        evaluate: Callable[[], Tensor], theta: Vector, x: Vector, cotangents: Sequence[Tensor], *arguments: Any
    ) -> TracedResult | None:
        """Return the cotangents of `x`, all of which need one; `None` where the loss does not reach all of θ.

        `evaluate` gives the loss at θ and x as they are.
        """

    @abstractmethod
    def allows(self, stage: StageFunction, theta: Sequence[Tensor]) -> bool:
        """Whether it does what `pullback` would do at this stage, as far as can be known before."""

    @abstractmethod
    def arguments(self, stage: StageFunction, theta: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return those of `run`: numbers as tensors, and what it is compiled for.

        They depend on the learning rates, weight decays and signs of the stage, and on where θ is and in which dtype.
        """

    @abstractmethod
    def ending(
        self, stage: StageFunction, theta: Sequence[Tensor], losses: Sequence[float], numbers: Sequence[float]
    ) -> tuple[Ending, float | None] | None:
        """Return how it ended and ‖g‖ if it is known; `None` if it is to be left to `pullback`."""


class TracedSolve(TracedPullback):
    """−Gᵀλ with Hᵀλ = c by a recurrence and double backward. Its numbers: ‖c‖, those of the recurrence, ‖g‖.

    c is brought near length 1 before if its square could leave the range of its dtype, as in `ImplicitMethod.pullback`.
    """

    evaluations = 1
    moves = False

    def __init__(self, recurrence: Recurrence) -> None:
        """Take the solver."""
        self.steps = recurrence.steps
        self.count = 2 + recurrence.count
        self._recurrence = recurrence

    @staticmethod
    def run(
        evaluate: Callable[[], Tensor], theta: Vector, x: Vector, cotangents: Sequence[Tensor], *arguments: Any
    ) -> TracedResult | None:
        """Return −Gᵀλ from one evaluation of the loss."""
        solve, steps, factors, decays = arguments
        gradient = slopes((evaluate(),), theta, create_graph=True)
        live = [t.detach() for t in gradient if t is not None]
        if len(live) < len(theta):
            return None

        def product(vector: Sequence[Tensor]) -> list[Tensor]:
            rows = slopes(gradient, theta, vector, retain_graph=True)
            curved = [
                torch.zeros_like(t) if r is None else r.to_dense() if r.is_sparse else r
                for r, t in zip(rows, theta, strict=True)
            ]
            if not decays:
                return curved
            return [c + times(d, v) for c, d, v in zip(curved, decays, vector, strict=True)]

        size = length(cotangents)
        safe = (size > SAFE_LENGTHS[0]) & (size < SAFE_LENGTHS[1])
        unit = torch.where(safe, torch.ones_like(size), size.log2().round().exp2())
        rhs = [times((1 / unit).to(wide(c.dtype)), c) for c in cotangents]
        adjoint, rows = solve(product, rhs, steps, factors)
        if decays:
            live = [t + times(d, p.detach()) for t, d, p in zip(live, decays, theta, strict=True)]
        numbers = [size / unit, *[number for row in rows for number in row], length(live)]
        mixed = slopes(gradient, x, adjoint)
        return TracedResult(tuple([None if t is None else times(-unit.to(wide(t.dtype)), t) for t in mixed]), numbers)

    def allows(self, stage: StageFunction, theta: Sequence[Tensor]) -> bool:
        """Whether the stage minimises, and the solve is short enough to be compiled."""
        return self.steps <= MOST_STEPS and self.steps * len(theta) <= _LONGEST_SOLVE and min(stage.signs) > 0

    def arguments(self, stage: StageFunction, theta: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the solver, its length and factors, and the weight decays if there are any."""
        decays = numbers_as_tensors(stage.weight_decays, theta) if any(stage.weight_decays) else ()
        return self._recurrence.run, self.steps, self._recurrence.factors(stage, theta), decays

    def ending(
        self, stage: StageFunction, theta: Sequence[Tensor], losses: Sequence[float], numbers: Sequence[float]
    ) -> tuple[Ending, float | None] | None:
        """Return what the recurrence makes of its numbers."""
        size, *steps, distance = numbers
        if not 0 < size < math.inf:
            return None
        ending = self._recurrence.ending(steps, theta, size)
        return None if ending is None else (ending, distance)
