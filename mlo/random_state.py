"""The state of the random generators, so that a loss can be evaluated twice with the same draws."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """A snapshot of torch's generators and, where asked for, of Python's and NumPy's global ones.

    Torch's states cost less than a microsecond to take; NumPy's costs thirty, so that it is taken only
    where it is known to matter.
    """

    cpu: torch.Tensor
    cuda: tuple[tuple[torch.device, torch.Tensor], ...]
    host: tuple[Any, dict[str, Any]] | None

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


def host_state() -> tuple[Any, dict[str, Any]]:
    """Return the states of Python's and NumPy's global generators."""
    return random.getstate(), np.random.get_state(legacy=False)


def same_host_state(a: tuple[Any, dict[str, Any]], b: tuple[Any, dict[str, Any]]) -> bool:
    """Whether nothing was drawn from Python's or NumPy's global generator between the two."""
    x, y = a[1], b[1]
    return (
        a[0] == b[0]
        and (x["has_gauss"], x["gauss"], x["state"]["pos"]) == (y["has_gauss"], y["gauss"], y["state"]["pos"])
        and np.array_equal(x["state"]["key"], y["state"]["key"])
    )


@contextmanager
def preserved(devices: Iterable[torch.device] = (), *, host: bool = True) -> Iterator[None]:
    """Leave the generators as they were."""
    before = RandomState.capture(devices, host=host)
    try:
        yield
    finally:
        before.restore()
