"""What surrounds the cells of a network, the same for the search and for the network that is derived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from examples.nas_interleaving.operations import FactorizedReduce, ReluConvNorm, normalisation

_STEM_MULTIPLIER = 3


def reductions(cells: int) -> set[int]:
    """Return which cells halve the resolution: those at one and two thirds, but never the first."""
    return {cells // 3, 2 * cells // 3} - {0}


class Macro(nn.Module):
    """Stem, a row of cells that each read the two before, and global average pooling.

    Args:
        image_channels: channels of the images.
        channels: channels of an intermediate node; each reduction cell doubles them.
        cells: number of cells, at least 2: the last is then a reduction cell.
        nodes: intermediate nodes of a cell; a cell puts out nodes · channels.
        make_cell: `make_cell(channels, reduction)` → a module called as `cell(s0, s1, *context)`.
        derived: whether it is the network of a genotype rather than a supernet (see `normalisation`).

    """

    def __init__(
        self,
        image_channels: int,
        channels: int,
        cells: int,
        nodes: int,
        make_cell: Callable[[int, bool], nn.Module],
        derived: bool,
    ) -> None:
        super().__init__()
        width = _STEM_MULTIPLIER * channels
        self.stem = nn.Sequential(
            nn.Conv2d(image_channels, width, 3, padding=1, bias=False), normalisation(width, derived)
        )
        before_last, last, current = width, width, channels
        halved = False
        self.inputs0, self.inputs1, self.cells = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i in range(cells):
            reduction = i in reductions(cells)
            current *= 2 if reduction else 1
            self.inputs0.append(
                _Halved(before_last, current, derived) if halved else ReluConvNorm(before_last, current, derived)
            )
            self.inputs1.append(ReluConvNorm(last, current, derived))
            self.cells.append(make_cell(current, reduction))
            before_last, last, halved = last, nodes * current, reduction
        self.features = last

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        """Return (N, features)."""
        s0 = s1 = self.stem(images)
        for fit0, fit1, cell in zip(self.inputs0, self.inputs1, self.cells, strict=True):
            s0, s1 = s1, cell(fit0(s0), fit1(s1), *context)
        return s1.mean(dim=(2, 3))


class _Halved(FactorizedReduce):
    """Brings the output of the cell before a reduction cell to the resolution after it."""

    def __init__(self, channels_in: int, channels_out: int, derived: bool) -> None:
        super().__init__(channels_in, channels_out, 1, derived)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, channels_out, ⌈H/2⌉, ⌈W/2⌉)."""
        return super().forward(x).squeeze(1)
