"""The state of the random generators, so that a loss can be evaluated twice with the same draws."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import mtrand


class HostState(NamedTuple):
    """The states of Python's and NumPy's global generators.

    Python's takes six microseconds to get and leaves 625 new numbers in the caches, NumPy's takes thirty, and twice
    that to set. Their words are read from where they lie in less than one.

    Attributes:
        mark: by which it is seen whether anything was drawn since (`_Generators.mark`).
        python: Python's words and position.
        kept: the normal number that Python's generator keeps for the next call.
        words: NumPy's words and position, without the number that it may keep likewise; `None` for another generator
            than a Mersenne twister.
        numpy: NumPy's whole state, or `None` if its words are to do.

    """

    mark: Any
    python: Any
    kept: float | None
    words: bytes | None
    numpy: Any

    @classmethod
    def capture(cls, *, whole: bool = True) -> HostState:
        """Take the present states, NumPy's by its words alone if they need not be `whole`."""
        found = _GENERATORS.state()
        return found._replace(numpy=np.random.get_state(legacy=False)) if whole else found

    def restore(self) -> None:
        """Put the generators back, if anything was drawn from them."""
        (python, numpy), (python_now, numpy_now) = self.mark, _GENERATORS.mark()
        if python != python_now:
            _set_python_state(self.python, self.kept)
        # The number that NumPy keeps can be drawn without a change of the words.
        kept = self.numpy is not None and (self.words is None or self.numpy["has_gauss"])
        if kept or numpy != numpy_now:
            np.random.set_state(_of_words(self.words) if self.numpy is None else self.numpy)

    def unmoved(self) -> bool:
        """Whether nothing was drawn since."""
        if self.mark != _GENERATORS.mark():
            return False
        return self.numpy is None or _same(self.numpy, np.random.get_state(legacy=False))


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
        cuda = tuple([(d, torch.cuda.get_rng_state(d)) for d in devices if d.type == "cuda"]) if devices else ()
        return cls(_CPU.get_state(), cuda, HostState.capture(whole=whole) if host else None)

    def restore(self) -> None:
        """Put the generators back."""
        _CPU.set_state(self.cpu)
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)
        if self.host is not None:
            self.host.restore()

    def moved(self) -> bool:
        """Whether any of these generators has been drawn from since it was in this state."""
        if self.host is not None and not self.host.unmoved():
            return True
        now = RandomState.capture([device for device, _ in self.cuda], host=False)
        pairs = [(self.cpu, now.cpu), *((a, b) for (_, a), (_, b) in zip(self.cuda, now.cuda, strict=True))]
        return any(not torch.equal(a, b) for a, b in pairs)


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
        return HostState.capture() if self.found or self.unknown else _GENERATORS.state()

    def after(self, before: HostState) -> HostState | None:
        """Look at them again; return the state with which the evaluation is to be repeated, if it draws."""
        self.unknown = False
        if not self.found and before.unmoved():
            return None
        self.found = True
        return before


_CPU = torch.default_generator
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
    """Return the numbers at a place, as they are whenever they are read."""
    return None if place is None else (ctypes.c_uint32 * 625).from_address(place)


_PYTHON_WORDS = _view(_place_of_words())


def _set_python_state(state: Any, kept: float | None) -> None:
    if _PYTHON_WORDS is not None:
        position, *numbers = np.frombuffer(state, np.uint32).tolist()
        state = 3, (*numbers, position), kept
    random.setstate(state)


class _Generators:
    """Reads the states of both generators from where they lie, and keeps the last ones as long as nothing is drawn."""

    def __init__(self) -> None:
        self._bits: object = None
        self._numpy: Any = None
        self._last: HostState | None = None

    def mark(self) -> Any:
        """Return numbers that change with every draw.

        They are the position in the words, which goes on with each draw, and the ends of the words, all of which are
        new whenever the position starts over: 32 random bits each, should it have arrived at the same place.
        """
        bits = mtrand.get_bit_generator()
        if bits is not self._bits:
            self._find(bits)
        p, n = _PYTHON_WORDS, self._numpy
        python = random.getstate() if p is None else (p[0], p[1], p[624], _PYTHON.gauss_next)
        return python, None if n is None else (n[624], n[0], n[623])

    def state(self) -> HostState:
        """Return the words of both, and NumPy's whole state where its words cannot be read."""
        mark, last = self.mark(), self._last
        if last is None or last.mark != mark:
            python = random.getstate() if _PYTHON_WORDS is None else bytes(_PYTHON_WORDS)
            words = None if self._numpy is None else bytes(self._numpy)
            last = self._last = HostState(mark, python, _PYTHON.gauss_next, words, None)
        if last.words is None:
            return last._replace(numpy=np.random.get_state(legacy=False))
        return last

    def _find(self, bits: Any) -> None:
        """Find NumPy's words, at first and whenever its global generator is replaced."""
        twister = isinstance(bits, np.random.MT19937)
        self._bits, self._numpy = bits, _view(bits.ctypes.state_address if twister else None)


_GENERATORS = _Generators()


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


class Preserved:
    """A context manager that leaves the generators as they were; its value is their state.

    Args:
        devices, host, whole: see `RandomState.capture`.

    """

    __slots__ = ("_before", "_devices", "_host", "_whole")

    def __init__(self, devices: Iterable[torch.device] = (), *, host: bool = True, whole: bool = True) -> None:
        """Take note of what to preserve; nothing is looked at yet."""
        self._devices, self._host, self._whole = devices, host, whole

    def __enter__(self) -> RandomState:
        """Take the states."""
        self._before = RandomState.capture(self._devices, host=self._host, whole=self._whole)
        return self._before

    def __exit__(self, *_: object) -> None:
        """Put them back."""
        self._before.restore()
