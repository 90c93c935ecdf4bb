"""The parts of the thread's state that a loss depends on, carried from a node to its evaluations."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Autocast:
    """The autocast settings of the moment at which a node was made.

    Autocast is off during a backward pass, and a backward pass on a GPU runs on another thread: an
    evaluation in there has to be given the settings of the forward pass it belongs to.
    """

    settings: tuple[tuple[str, torch.dtype | None], ...]

    @classmethod
    def capture(cls, device_types: Iterable[str]) -> Autocast:
        """Take the present settings for the given device types, each named once: the dtype, `None` where it is off."""
        for device_type in device_types:
            if torch.is_autocast_enabled(device_type):
                enabled = [(t, torch.is_autocast_enabled(t)) for t in device_types]
                return cls(tuple([(t, torch.get_autocast_dtype(t) if on else None) for t, on in enabled]))
        return _off(tuple(device_types))

    def restored(self) -> AbstractContextManager[object]:
        """Return a context manager that runs a block under these settings."""
        for device_type, dtype in self.settings:
            if dtype is not None or torch.is_autocast_enabled(device_type):
                return self._entered()
        return _AS_IT_IS

    def _entered(self) -> ExitStack:
        with ExitStack() as stack:
            for device_type, dtype in self.settings:
                if dtype is not None:
                    # Without its cache, which would hand out casts of weights that a method has moved since.
                    stack.enter_context(torch.autocast(device_type, dtype=dtype, cache_enabled=False))
                elif torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            return stack.pop_all()


@cache
def _off(device_types: tuple[str, ...]) -> Autocast:
    return Autocast(tuple([(t, None) for t in device_types]))


_AS_IT_IS = nullcontext()


class Differentiating:
    """Gradients on, whatever the caller's mode; backward passes on one thread, since bindings are shared by all.

    A cache of autocast is off: in a region around several steps it would hand out casts of parameters that have
    moved since.
    """

    __slots__ = ("_cached", "_grad", "_modes", "_threads")

    def __enter__(self) -> None:
        """Set all three, and note what they were."""
        self._cached, self._grad = torch.is_autocast_cache_enabled(), torch.is_grad_enabled()
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        # What is so already is left out: to enter it would take longer than to look.
        self._modes: ExitStack | None = None
        if torch.is_inference_mode_enabled() or not self._grad:
            self._modes = ExitStack()
            self._modes.enter_context(torch.inference_mode(False))
            self._modes.enter_context(torch.enable_grad())
        self._threads = torch.autograd.set_multithreading_enabled(False)

    def __exit__(self, *error: object) -> None:
        """Set them as they were."""
        self._threads.__exit__(*error)
        if self._modes is not None:
            self._modes.close()
        torch.set_grad_enabled(self._grad)  # a loss that failed may have left another mode
        torch.set_autocast_cache_enabled(self._cached)
