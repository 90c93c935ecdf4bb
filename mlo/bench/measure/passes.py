"""Reverse passes: how often the autograd engine runs, in any library over torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.graph

_PLACES = (torch.autograd, torch.autograd.graph)
_NAME = "_engine_run_backward"


def reverse_passes(call: Callable[[], object]) -> int | None:
    """Return how many reverse passes a call makes, or `None` if this torch has no place to count them.

    `Tensor.backward`, `torch.autograd.backward` and `torch.autograd.grad` (and `torch.func`, which calls it) all run
    the engine by one function, which is replaced for the time of the call.
    """
    if not all(hasattr(place, _NAME) for place in _PLACES):
        return None
    originals = [getattr(place, _NAME) for place in _PLACES]
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return originals[1](*args, **kwargs)

    for place in _PLACES:
        setattr(place, _NAME, counted)
    try:
        call()
    finally:
        for place, original in zip(_PLACES, originals, strict=True):
            setattr(place, _NAME, original)
    return count
