"""The row of cells of a network, the same for the search and for the network that is derived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from examples.nas_interleaving.operations import HalvedFit, ReluConvNorm


def reductions(cells: int) -> set[int]:
    """Return which cells halve the resolution: those at one and two thirds, but never the first."""
    return {cells // 3, two_thirds(cells)} - {0}


def two_thirds(cells: int) -> int:
    """Return the cell at two thirds of the depth: a reduction cell, and where an auxiliary tower reads."""
    return 2 * cells // 3


class Macro(nn.Module):
    """A row of cells that each read the two before, and what fits their inputs to them.

    What the first cell reads comes from a stem; the first of the two is fitted there, since stems differ in it.

    Args:
        width: channels of the second output of the stem.
        channels: channels of an intermediate node; each reduction cell doubles them.
        cells: number of cells, at least 2: the last is then a reduction cell.
        nodes: intermediate nodes of a cell; a cell puts out nodes · channels.
        make_cell: `make_cell(channels, reduction)` → a module called as `cell(s0, s1, *context)`.
        derived: whether it is the network of a genotype rather than a supernet (see `normalisation`).

    Attributes:
        features: channels that the last cell puts out.
        features_inside: those of the cell at two thirds.

    """

    def __init__(
        self,
        width: int,
        channels: int,
        cells: int,
        nodes: int,
        make_cell: Callable[[int, bool], nn.Module],
        derived: bool,
    ) -> None:
        super().__init__()
        self._inside = two_thirds(cells)
        before_last, last, current = 0, width, channels
        halved = False
        self.inputs0, self.inputs1, self.cells = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i in range(cells):
            reduction = i in reductions(cells)
            current *= 2 if reduction else 1
            fit = HalvedFit if halved else ReluConvNorm
            self.inputs0.append(nn.Identity() if i == 0 else fit(before_last, current, derived))
            self.inputs1.append(ReluConvNorm(last, current, derived))
            self.cells.append(make_cell(current, reduction))
            before_last, last, halved = last, nodes * current, reduction
            if i == self._inside:
                self.features_inside = last
        self.features = last

    def forward(self, s0: Tensor, s1: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """Return what the last cell puts out, and the cell at two thirds."""
        inside = s1
        for i, (fit0, fit1, cell) in enumerate(zip(self.inputs0, self.inputs1, self.cells, strict=True)):
            s0, s1 = s1, cell(fit0(s0), fit1(s1), *context)
            if i == self._inside:
                inside = s1
        return s1, inside
