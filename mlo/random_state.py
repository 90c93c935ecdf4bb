"""The state of the random generators, so that a loss can be evaluated twice with the same draws."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand

#: The states of Python's and NumPy's global generators.
HostState = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class RandomState:
    """A snapshot of torch's generators and, where asked for, of Python's and NumPy's global ones.

    Torch's states cost less than a microsecond to take; NumPy's costs thirty, so that it is taken only
    where it is known to matter.
    """

    cpu: torch.Tensor
    cuda: tuple[tuple[torch.device, torch.Tensor], ...]
    host: HostState | None

    @classmethod
    def capture(cls, devices: Iterable[torch.device] = (), *, host: bool = True) -> RandomState:
        """Take the present state; `devices` are those whose CUDA generators matter, `host` Python's and NumPy's."""
        cuda = tuple((d, torch.cuda.get_rng_state(d)) for d in devices if d.type == "cuda")
        return cls(torch.get_rng_state(), cuda, host_state() if host else None)

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)
        if self.host is not None:
            random.setstate(self.host[0])
            np.random.set_state(self.host[1])


def host_state() -> HostState:
    """Return the states of Python's and NumPy's global generators."""
    return random.getstate(), np.random.get_state(legacy=False)


class HostDraws:
    """Finds out whether a loss draws from Python's or NumPy's global generator, at little cost.

    NumPy's state is read from where it lies, in a hundredth of the time that `numpy.random.get_state` takes; what that
    leaves out, a second normal number kept for the next call, is looked at in the first evaluation.

    Attributes:
        found: whether the loss was seen to draw.

    """

    def __init__(self) -> None:
        """Start before the first evaluation."""
        self.found = False
        self._first = True

    def before(self) -> tuple[Any, dict[str, Any] | bytes]:
        """Look at the generators before an evaluation."""
        generator = mtrand.get_bit_generator()
        if self.found or self._first or not isinstance(generator, np.random.MT19937):
            return host_state()
        return random.getstate(), _words(generator)

    def after(self, before: tuple[Any, dict[str, Any] | bytes]) -> HostState | None:
        """Look at them again; return the state with which the evaluation is to be repeated, if it draws."""
        self._first = False
        python, numpy = before
        if not isinstance(numpy, bytes):
            python_now, numpy_now = host_state()
            self.found = self.found or python != python_now or not _same(numpy, numpy_now)
            return (python, numpy) if self.found else None
        if random.getstate() == python and _words(mtrand.get_bit_generator()) == numpy:
            return None
        self.found = True
        words = np.frombuffer(numpy, np.uint32)
        state = {"key": words[:-1].copy(), "pos": int(words[-1])}
        return python, {"bit_generator": "MT19937", "state": state, "has_gauss": 0, "gauss": 0.0}


def _words(generator: Any) -> bytes:
    """Return the 624 words of the state of a Mersenne twister and its position among them."""
    return ctypes.string_at(generator.ctypes.state_address, 4 * 625)


def _same(a: Any, b: Any) -> bool:
    """Whether two states of a NumPy generator are equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b))


@contextmanager
def preserved(devices: Iterable[torch.device] = (), *, host: bool = True) -> Iterator[None]:
    """Leave the generators as they were."""
    before = RandomState.capture(devices, host=host)
    try:
        yield
    finally:
        before.restore()
