"""The network that a genotype describes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.nas_interleaving.auxiliary import AuxiliaryTower, DropPath
from examples.nas_interleaving.genotype import Cell, Genotype
from examples.nas_interleaving.macro import Macro
from examples.nas_interleaving.operations import OPERATIONS, Identity
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

    def forward(self, s0: Tensor, s1: Tensor, drop: DropPath | None = None) -> Tensor:
        """Return the intermediate nodes side by side, (N, nodes·C, H', W').

        Identities are never dropped, so that something of every image is left.
        """
        states = [s0, s1]
        operations = iter(self.operations)
        for sources in self._sources:
            terms = []
            for state in sources:
                run = next(operations)
                term = run(states[state])
                terms.append(term if drop is None or isinstance(run, Identity) else drop(term))
            states.append((terms[0] + terms[1]).squeeze(1))
        return torch.cat(states[2:], dim=1)


class Network(nn.Module):
    """An image classifier built from a genotype.

    Args:
        genotype: of the cells.
        image_shape: channels, height and width of the images.
        channels: channels of a node in the first cell.
        cells: number of cells.
        classes: number of classes.
        stem: form of the stem, see `make_stem`.
        auxiliary: whether there is an auxiliary tower, for `training_scores`.

    """

    def __init__(
        self,
        genotype: Genotype,
        image_shape: Sequence[int],
        channels: int,
        cells: int,
        classes: int,
        *,
        stem: str = "auto",
        auxiliary: bool = False,
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
        self.auxiliary = AuxiliaryTower(self.macro.features_inside, classes) if auxiliary else None

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores, (N, classes)."""
        last, _ = self.macro(*self.stem(images))
        return self._scores(last)

    def training_scores(self, images: Tensor, drop: DropPath) -> list[Tensor]:
        """Return class scores with paths dropped, and those of the auxiliary tower if there is one."""
        last, inside = self.macro(*self.stem(images), drop)
        scores = [self._scores(last)]
        return scores if self.auxiliary is None else [*scores, self.auxiliary(inside)]

    def _scores(self, last: Tensor) -> Tensor:
        return self.head(last.mean(dim=(2, 3)))
