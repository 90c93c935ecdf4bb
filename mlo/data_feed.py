"""Batches of a problem, one after the other, again and again."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mlo.errors import ConfigurationError
from mlo.random_state import Preserved

_PARTS = ("sampler", "batch_sampler", "dataset")


class DataFeed:
    """Runs through a problem's data without end; `None` as data gives the batch `None` for ever."""

    def __init__(self, problem: str, data: Iterable[Any] | None) -> None:
        """Start before the first batch; nothing is read yet."""
        self._problem, self._data = problem, data
        self._iterator: Iterator[Any] | None = None

    def next_batches(self, count: int) -> list[Any]:
        """Return the next `count` batches, starting over at the end of the data."""
        return [self._next()] if count == 1 else [self._next() for _ in range(count)]

    def _next(self) -> Any:
        if self._data is None:
            return None
        if self._iterator is not None:
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None
        self._iterator = iter(self._data)
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = None
            raise ConfigurationError(
                f"problem {self._problem!r}, data: expected at least one batch each time it is run through; got none. "
                "The data is empty, or can be run through only once (give it an __iter__ that starts afresh)."
            ) from None

    def preview(self, count: int, devices: Iterable[torch.device]) -> list[Any]:
        """Return the first `count` batches of a fresh run, and leave all generators and the position as they were."""
        if self._data is None or type(self._data) in (list, tuple):  # which draw from no generator
            return DataFeed(self._problem, self._data).next_batches(count)
        with Preserved(devices), _own_generators_preserved(self._data):
            return DataFeed(self._problem, self._data).next_batches(count)


@contextmanager
def _own_generators_preserved(data: object) -> Iterator[None]:
    """Leave the generators that the data holds (a loader's or a sampler's) as they were."""
    kept = [(generator, _state(generator)) for generator in _generators(data)]
    try:
        yield
    finally:
        for generator, state in kept:
            _set_state(generator, state)


def _generators(data: object) -> list[Any]:
    """Find generators among the attributes of the data, of its samplers and of its data set."""
    found: dict[int, Any] = {}
    pending, seen = [data], set()
    while pending:
        owner = pending.pop()
        if owner is None or id(owner) in seen:
            continue
        seen.add(id(owner))
        for value in getattr(owner, "__dict__", {}).values():
            if isinstance(value, torch.Generator | random.Random | np.random.Generator | np.random.RandomState):
                found[id(value)] = value
        pending += [getattr(owner, part, None) for part in _PARTS]
    return list(found.values())


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
