"""The training modes of modules, kept over a block."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class TrainingModesKept:
    """A context manager that leaves modules, and all their parts, in the modes in which they were."""

    __slots__ = ("_kept", "_modules")

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Take note of the modules; nothing is looked up yet."""
        self._modules = modules

    def __enter__(self) -> None:
        """Look up the modes."""
        # Looked for anew each time, since parts may have been replaced; `nn.Module.modules` makes names as well.
        parts = list(self._modules)
        seen = set(map(id, parts))
        for part in parts:  # grows meanwhile
            for child in part._modules.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    parts.append(child)
        self._kept = [(part, part.training) for part in parts]

    def __exit__(self, *_: object) -> None:
        """Set them again."""
        for part, mode in self._kept:
            if part.training is not mode:
                part.training = mode
