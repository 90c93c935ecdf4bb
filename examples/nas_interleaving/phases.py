"""Progressive search in phases, each on a deeper network with fewer operations (P-DARTS, Chen et al., ICCV 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from examples.nas_interleaving.search_settings import SearchSettings

# P-DARTS multiplies the rate by exp(−0.2) in each of the 25 epochs of a phase.
_FADING = 5.0


@dataclass(frozen=True)
class Phase:
    """One phase of a search.

    Attributes:
        settings: of the phase alone.
        operations: how many operations an edge has left; 0 for all.
        skip_dropout: the rate of dropout behind skip connections at the beginning.

    """

    settings: SearchSettings
    operations: int
    skip_dropout: float

    def skip_dropout_after(self, step: int) -> float:
        """Return the rate after so many steps of the phase."""
        return self.skip_dropout * math.exp(-_FADING * step / self.settings.steps)


def phases(settings: SearchSettings) -> list[Phase]:
    """Return the phases of a search, commonly one; the settings count in steps."""
    number = max(1, len(settings.shrink_operations))
    cells = settings.shrink_cells or (settings.cells,) * number
    operations = settings.shrink_operations or (0,)
    dropout = settings.skip_dropout or (0.0,) * number
    alone = replace(settings, shrink_cells=(), shrink_operations=(), skip_dropout=())
    return [Phase(replace(alone, cells=c), o, rate) for c, o, rate in zip(cells, operations, dropout, strict=True)]


def set_skip_dropout(networks: Iterable[nn.Module], rate: float) -> None:
    """Set the rate of dropout behind skip connections of all networks."""
    for network in networks:
        network.encoder.set_skip_dropout(rate)  # type: ignore[operator, union-attr]
