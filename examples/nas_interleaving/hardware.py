"""Where a search runs, and in which precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from examples.nas_interleaving.options import SettingsError


def find_device(name: str) -> torch.device:
    """Return a device that is there.

    Raises:
        SettingsError: it is unknown, or this machine has none such.

    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"device = {name!r}: expected a device of this machine, e.g. cpu; {reason}") from None
    return device


class OnDevice:
    """Batches of a loader, moved to a device as they are drawn."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self._loader = loader
        self._device = device

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Run through the loader."""
        for batch in self._loader:
            yield _moved(batch, self._device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return type(batch)(_moved(part, device) for part in batch)


class Precision:
    """The precision of the networks' passes; weights, losses and what is solved for keep that of the parameters."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._type = device.type
        self._dtype = None if name == "float32" else getattr(torch, name)

    def region(self) -> AbstractContextManager[Any]:
        """Return a context in which operations that can use the lower precision do."""
        return torch.autocast(self._type, self._dtype, enabled=self._dtype is not None)

    def restored(self, scores: Tensor) -> Tensor:
        """Return scores in the precision in which losses are computed."""
        return scores if self._dtype is None else scores.float()
