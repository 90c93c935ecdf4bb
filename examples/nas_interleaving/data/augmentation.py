"""Random changes of whole batches of images, drawn from a given generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ShiftAndFlip:
    """A random crop of the image after a border of zeros was put around it, and a mirror image half of the time.

    Attributes:
        padding: width of the border in pixels; the image moves by up to as many pixels in each direction.
        flip: whether left and right are exchanged with probability ½.

    """

    padding: int
    flip: bool

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Return changed images, (N, C, H, W) as those given. Each image has draws of its own."""
        n, channels, height, width = images.shape
        shift = torch.randint(2 * self.padding + 1, (2, n, 1), generator=generator)
        rows, columns = torch.arange(height) + shift[0], torch.arange(width) + shift[1]
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (self.padding,) * 4)
        return padded[
            torch.arange(n).view(-1, 1, 1, 1),
            torch.arange(channels).view(1, -1, 1, 1),
            rows.view(n, 1, height, 1),
            columns.view(n, 1, 1, width),
        ]


def cutout(images: Tensor, length: int, generator: Generator) -> Tensor:
    """Return the images with a square of zeros at a random place of each.

    The centre of the square is any pixel, so that a part of it can lie outside. Applied after normalisation, zero is
    the mean of the data (DeVries and Taylor 2017, arXiv 1708.04552).

    Args:
        images: of shape (N, C, H, W).
        length: side of the square in pixels; 0 leaves the images as they are.
        generator: for the places, on the CPU wherever the images are.

    """
    n, _, height, width = images.shape
    rows = _outside(height, length, n, generator).view(n, 1, height, 1)
    columns = _outside(width, length, n, generator).view(n, 1, 1, width)
    return images * (rows | columns).to(images)


def _outside(size: int, length: int, count: int, generator: Generator) -> Tensor:
    """Return whether each position of a row lies outside an interval of a length, (count, size)."""
    start = torch.randint(size, (count, 1), generator=generator) - length // 2
    position = torch.arange(size)
    return (position < start) | (position >= start + length)
