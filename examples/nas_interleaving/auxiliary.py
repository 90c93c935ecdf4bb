"""What networks have during training only: an auxiliary tower, and paths that are dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from examples.nas_interleaving.operations import normalisation

_WIDTHS = 128, 768
_WINDOW = 5


class AuxiliaryTower(nn.Module):
    """A second head, on the cell at two thirds of the depth; its loss helps the cells before it to learn.

    The widths are those of DARTS. Pooling leaves 2×2: as in DARTS, windows of 5×5 in opposite corners where that
    covers maps of 6 to 10 pixels a side (8 for CIFAR, 7 for ImageNet), and equal parts for any other size.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        narrow, wide = _WIDTHS
        self.layers = nn.Sequential(
            nn.Conv2d(channels, narrow, 1, bias=False),
            normalisation(narrow, derived=True),
            nn.ReLU(),
            nn.Conv2d(narrow, wide, 2, bias=False),
            normalisation(wide, derived=True),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(wide, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores, (N, classes)."""
        x = F.relu(x)
        height, width = x.shape[-2:]
        if min(height, width) > _WINDOW and max(height, width) <= 2 * _WINDOW:
            return self.layers(F.avg_pool2d(x, _WINDOW, stride=(height - _WINDOW, width - _WINDOW)))
        return self.layers(F.adaptive_avg_pool2d(x, 2))


@dataclass(frozen=True)
class DropPath:
    """Sets what an operation puts out to zero for some of the images, and scales the others up.

    Attributes:
        rate: share of the images, below 1.
        generator: for the choice, on the CPU wherever the images are.

    """

    rate: float
    generator: Generator

    def __call__(self, x: Tensor) -> Tensor:
        """Return what is left, of the shape of `x`; the first dimension is that of the images."""
        if self.rate == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), generator=self.generator) >= self.rate
        return x * (kept.to(x) / (1 - self.rate))
