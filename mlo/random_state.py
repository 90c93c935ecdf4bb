"""The state of the random generators, so that a loss can be evaluated twice with the same draws."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import mtrand


class HostState(NamedTuple):
    """The states of Python's and NumPy's global generators.

    Python's takes six microseconds to get and leaves 625 new numbers in the caches, NumPy's takes thirty, and twice
    that to set. Their words are read from where they lie in less than one; NumPy's lack a normal number that it may
    keep for the next call.
    """

    python: Any
    numpy: Any
    words: bytes | None

    @classmethod
    def capture(cls, *, whole: bool = True) -> HostState:
        """Take the present states, NumPy's by its words alone if they need not be `whole`."""
        words = _words()
        numpy = np.random.get_state(legacy=False) if whole or words is None else None
        return cls(_python_state(), numpy, words)

    def restore(self) -> None:
        """Put the generators back, if anything was drawn from them."""
        if _python_state() != self.python:
            _set_python_state(self.python)
        # The number that NumPy keeps can be drawn without a change of the words.
        kept = self.numpy is not None and (self.words is None or self.numpy["has_gauss"])
        if kept or _words() != self.words:
            np.random.set_state(_of_words(self.words) if self.numpy is None else self.numpy)

    def unmoved(self) -> bool:
        """Whether nothing was drawn since."""
        same = self.python == _python_state() and self.words == _words()
        return same and (self.numpy is None or _same(self.numpy, np.random.get_state(legacy=False)))


class RandomState(NamedTuple):
    """A snapshot of torch's generators and, where asked for, of Python's and NumPy's global ones.

    Torch's states cost less than a microsecond to take; NumPy's costs thirty, so that it is taken only
    where it is known to matter.
    """

    cpu: torch.Tensor
    cuda: tuple[tuple[torch.device, torch.Tensor], ...]
    host: HostState | None

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = (), *, host: bool = True, whole: bool = True) -> RandomState:
        """Take the present state; `devices` are those whose CUDA generators matter, `host` Python's and NumPy's."""
        cuda = tuple([(d, torch.cuda.get_rng_state(d)) for d in devices if d.type == "cuda"])
        return cls(torch.default_generator.get_state(), cuda, HostState.capture(whole=whole) if host else None)

    def restore(self) -> None:
        """Put the generators back."""
        torch.default_generator.set_state(self.cpu)
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)
        if self.host is not None:
            self.host.restore()


class HostDraws:
    """Finds out whether a loss draws from Python's or NumPy's global generator, at little cost.

    In the first evaluation the whole states are compared, later ones without a normal number that NumPy may keep.

    Attributes:
        found: whether the loss was seen to draw.
        unknown: whether no evaluation was looked at yet.

    """

    def __init__(self) -> None:
        """Start before the first evaluation."""
        self.found = False
        self.unknown = True

    @property
    def possible(self) -> bool:
        """Whether the loss was seen to draw, or was not looked at yet."""
        return self.found or self.unknown

    def before(self) -> HostState:
        """Look at the generators before an evaluation."""
        return HostState.capture(whole=self.possible)

    def after(self, before: HostState) -> HostState | None:
        """Look at them again; return the state with which the evaluation is to be repeated, if it draws."""
        self.unknown = False
        self.found = self.found or not before.unmoved()
        return before if self.found else None


_SIZE = 4 * 625
_PYTHON: Any = random.random.__self__  # type: ignore[attr-defined]


def _place_of_words() -> int | None:
    """Return where Python's global generator keeps its position and its 624 words; `None` where that cannot be told.

    CPython keeps them right behind the header of the object, which is looked at before it is relied on.
    """
    place = id(_PYTHON) + object.__basicsize__
    if sys.implementation.name != "cpython" or type(_PYTHON).__basicsize__ < object.__basicsize__ + _SIZE:
        return None
    *words, position = random.getstate()[1]
    found = np.frombuffer(ctypes.string_at(place, _SIZE), np.uint32)
    return place if found.tolist() == [position, *words] else None


def _view(place: int | None) -> Any:
    """Return the bytes at a place, as they are whenever `.raw` is read."""
    return None if place is None else (ctypes.c_char * _SIZE).from_address(place)


_PYTHON_WORDS = _view(_place_of_words())


def _python_state() -> Any:
    """Return the state of Python's global generator, to be compared and to be set again."""
    if _PYTHON_WORDS is None:
        return random.getstate()
    return _PYTHON_WORDS.raw, _PYTHON.gauss_next


def _set_python_state(state: Any) -> None:
    if _PYTHON_WORDS is not None:
        words, kept = state
        position, *numbers = np.frombuffer(words, np.uint32).tolist()
        state = 3, (*numbers, position), kept
    random.setstate(state)


class _NumPyWords:
    """The 624 words and the position of NumPy's Mersenne twister, found again when its global generator is replaced."""

    def __init__(self) -> None:
        self._generator: object = None
        self._words: Any = None

    def read(self) -> bytes | None:
        """Return them; `None` for another generator."""
        generator = mtrand.get_bit_generator()
        if generator is not self._generator:
            twister = isinstance(generator, np.random.MT19937)
            self._generator, self._words = generator, _view(generator.ctypes.state_address if twister else None)
        return None if self._words is None else self._words.raw


_words = _NumPyWords().read


def _of_words(words: bytes | None) -> dict[str, Any]:
    """Return the state of a Mersenne twister for `numpy.random.set_state`."""
    numbers = np.frombuffer(words or b"", np.uint32)
    state = {"key": numbers[:-1].copy(), "pos": int(numbers[-1])}
    return {"bit_generator": "MT19937", "state": state, "has_gauss": 0, "gauss": 0.0}


def _same(a: Any, b: Any) -> bool:
    """Whether two states of a NumPy generator are equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b))


@contextmanager
def preserved(devices: Iterable[torch.device] = (), *, host: bool = True, whole: bool = True) -> Iterator[RandomState]:
    """Leave the generators as they were; the value is their state."""
    before = RandomState.capture(devices, host=host, whole=whole)
    try:
        yield before
    finally:
        before.restore()
