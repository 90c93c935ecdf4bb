"""The reverse sweep over stages, in terms that `torch.compile` can trace as one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.traced import Derivatives, Found, Traced, detached, loss_of, reaches, shapes, slopes, unlogged_loss_of
from mlo.traced_pullback import TracedResult
from mlo.vectors import Vector

Values = tuple[Vector, ...]
_Cotangents = dict[int, Sequence[Tensor | None]]


class TracedStage(NamedTuple):
    """One stage of a sweep, with problems by their numbers.

    Attributes:
        function: its loss, of a batch.
        batch: the batch.
        own: its number.
        wanted: those of the inputs whose cotangents are wanted.
        run: see `TracedPullback`.
        arguments: likewise.

    """

    function: Callable[[Any], Any]
    batch: Any
    own: int
    wanted: tuple[int, ...]
    run: Callable[..., TracedResult | None]
    arguments: tuple[Any, ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a function is compiled for."""
        constants = [a for a in self.arguments if not isinstance(a, tuple)]
        return self.run, self.own, self.wanted, *constants


def total_gradient(values: Values, read: tuple[int, ...], stages: tuple[TracedStage, ...]) -> Derivatives:
    """Return as what is wanted the gradient of a loss through the responses of `stages`, and the numbers of the sweep.

    The first of `values` are the parameters in which it is wanted, `read` the numbers of the problems whose values the
    loss reads as responses. The numbers are `None` where the losses do not reach what they are to; else for each stage
    its losses and those of its pullback.
    """
    kind = _total_gradient, tuple(map(shapes, values)), read, tuple([s.kind for s in stages])
    return Derivatives(_total_gradient, (values, read, stages), kind)


def pullback(values: Values, cotangents: Found, stage: TracedStage) -> Derivatives:
    """Return as what is wanted the cotangents of a stage's inputs for its own, and the numbers as above."""
    return Derivatives(_pullback, (values, cotangents, stage), (_pullback, tuple(map(shapes, values)), stage.kind))


def _total_gradient(
    function: Callable[[Any], Any],
    batch: Any,
    values: Values,
    read: tuple[int, ...],
    stages: tuple[TracedStage, ...],
) -> Traced:
    result = function(batch)
    at = (0, *read)
    found = slopes((loss_of(result),), tuple([t for i in at for t in values[i]]))
    cotangents = _divided(found, at, values)
    numbers: list[Tensor] = []
    complete = True
    for stage in stages:
        complete = complete and _pull_back(stage, values, cotangents, numbers)
    return detached(result), (*cotangents[0], _stacked(numbers) if complete else None), reaches(found)


def _pullback(function: Callable[[Any], Any], batch: Any, values: Values, given: Found, stage: TracedStage) -> Traced:
    cotangents: _Cotangents = {stage.own: given}
    numbers: list[Tensor] = []
    complete = _pull_back(stage._replace(function=function, batch=batch), values, cotangents, numbers)
    found = [t for i in stage.wanted for t in cotangents.get(i, ())]
    return None, (*found, _stacked(numbers) if complete else None), True


def _stacked(numbers: Sequence[Tensor]) -> Tensor:
    return torch.stack([n.detach().double().reshape(()) for n in numbers])


def _pull_back(stage: TracedStage, values: Values, cotangents: _Cotangents, numbers: list[Tensor]) -> bool:
    """Send a stage's cotangents back to its inputs and add its numbers; return whether that could be done."""
    theta = values[stage.own]
    given = cotangents.pop(stage.own, None)
    if given is None or not reaches(given):
        return False
    filled = [
        torch.zeros_like(t) if c is None else c.to_dense() if c.is_sparse else c
        for c, t in zip(given, theta, strict=True)
    ]
    losses: list[Tensor] = []

    def evaluate() -> Tensor:
        loss = unlogged_loss_of(stage.function(stage.batch))
        losses.append(loss)
        return loss

    x = tuple([t for i in stage.wanted for t in values[i]])
    result = stage.run(evaluate, theta, x, filled, *stage.arguments)
    if result is None:
        return False
    for i, arrived in _divided(result.found, stage.wanted, values).items():
        before = cotangents.get(i)
        cotangents[i] = arrived if before is None else list(map(_sum, before, arrived))
    numbers += [*losses, *result.numbers]
    return True


def _divided(found: Found, numbers: Sequence[int], values: Values) -> _Cotangents:
    divided: _Cotangents = {}
    begin = 0
    for i in numbers:
        end = begin + len(values[i])
        divided[i] = found[begin:end]
        begin = end
    return divided


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return b + a if a.is_sparse else a + b  # torch adds a sparse tensor to a dense one, not the other way round
