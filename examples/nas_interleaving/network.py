"""The network that a genotype describes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.nas_interleaving.genotype import Cell, Genotype
from examples.nas_interleaving.macro import Macro
from examples.nas_interleaving.operations import OPERATIONS
from examples.nas_interleaving.stems import make_stem


class DerivedCell(nn.Module):
    """A cell in which each node is the sum of the two operations that its genotype names."""

    def __init__(self, cell: Cell, channels: int, reduction: bool) -> None:
        super().__init__()
        self._sources = [[state for _, state in edges] for edges in cell]
        self.operations = nn.ModuleList()
        for edges in cell:
            for name, state in edges:
                make = OPERATIONS[name]
                assert make is not None, name
                self.operations.append(make(channels, 2 if reduction and state < 2 else 1, 1, True))

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        """Return the intermediate nodes side by side, (N, nodes·C, H', W')."""
        states = [s0, s1]
        operations = iter(self.operations)
        for first, second in self._sources:
            states.append((next(operations)(states[first]) + next(operations)(states[second])).squeeze(1))
        return torch.cat(states[2:], dim=1)


class Network(nn.Module):
    """An image classifier built from a genotype."""

    def __init__(
        self,
        genotype: Genotype,
        image_shape: Sequence[int],
        channels: int,
        cells: int,
        classes: int,
        *,
        stem: str = "auto",
    ) -> None:
        super().__init__()
        kinds = {False: genotype.normal, True: genotype.reduction}
        self.stem = make_stem(stem, image_shape, channels, derived=True)
        self.macro = Macro(
            self.stem.width,
            channels,
            cells,
            genotype.nodes,
            lambda c, reduction: DerivedCell(kinds[reduction], c, reduction),
            derived=True,
        )
        self.head = nn.Linear(self.macro.features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores, (N, classes)."""
        last, _ = self.macro(*self.stem(images))
        return self.head(last.mean(dim=(2, 3)))
