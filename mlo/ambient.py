"""The parts of the thread's state that a loss depends on, carried from a node to its evaluations."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Autocast:
    """The autocast settings of the moment at which a node was made.

    Autocast is off during a backward pass, and a backward pass on a GPU runs on another thread: an
    evaluation in there has to be given the settings of the forward pass it belongs to.
    """

    settings: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def capture(cls, device_types: Iterable[str]) -> Autocast:
        """Take the present settings for the given device types."""
        return cls(
            tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in dict.fromkeys(device_types))
        )

    def restored(self) -> AbstractContextManager[object]:
        """Return a context manager that runs a block under these settings."""
        wanted = [s for s in self.settings if s[1] or torch.is_autocast_enabled(s[0])]
        if not wanted:
            return nullcontext()
        with ExitStack() as stack:
            for device_type, enabled, dtype in wanted:
                stack.enter_context(torch.autocast(device_type, enabled=enabled, dtype=dtype))
            return stack.pop_all()
