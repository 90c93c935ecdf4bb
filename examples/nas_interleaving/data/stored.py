"""Images that lie in memory, as 8-bit numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from examples.nas_interleaving.data.images import Images, Item
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.data.splits import Split

Change = Callable[[Tensor, Generator], Tensor]


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each channel, (C, 1, 1), in 8-bit steps."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, pixels: Tensor) -> Scale:
        """Measure images of 8 bits, (N, C, H, W). A channel of one colour has the deviation 1."""
        levels = torch.arange(256, dtype=torch.float64)
        counts = torch.stack([torch.bincount(p.flatten(), minlength=256) for p in pixels.unbind(1)])
        shares = counts.double() / counts.sum(1, keepdim=True)
        mean = shares @ levels
        deviation = (shares @ levels.square() - mean.square()).clamp(min=0).sqrt()
        deviation = torch.where(deviation > 0, deviation, 1)
        return cls(mean.view(-1, 1, 1), deviation.view(-1, 1, 1))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return images with mean 0 and standard deviation 1 over those that were measured."""
        precision = torch.get_default_dtype()
        return pixels.to(precision).sub_(self.mean.to(precision)).div_(self.deviation.to(precision))


class StoredImages(Images):
    """Some of the images that lie in memory, normalised when they are read."""

    def __init__(self, pixels: Tensor, labels: Tensor, index: Tensor, scale: Scale, change: Change | None) -> None:
        self._pixels = pixels
        self._labels = labels
        self._index = index
        self._scale = scale
        self._change = change

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._index)

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return items as they are."""
        chosen = self._index[list(indices)]
        return self._items(self._pixels[chosen], chosen)

    def changed(self, indices: Sequence[int], generator: Generator) -> list[Item]:
        """Return items changed by draws from a generator."""
        chosen = self._index[list(indices)]
        pixels = self._pixels[chosen]
        return self._items(pixels if self._change is None else self._change(pixels, generator), chosen)

    def _items(self, pixels: Tensor, chosen: Tensor) -> list[Item]:
        return list(zip(self._scale.normalise(pixels), self._labels[chosen], strict=True))


def stored_parts(
    train: tuple[Tensor, np.ndarray],
    test: tuple[Tensor, np.ndarray],
    classes: Sequence[int],
    split: Split,
    change: Change | None,
) -> dict[str, Dataset]:
    """Return the parts of a task: their classes count from 0, and all are normalised by the training images.

    Args:
        train: images, (N, C, H, W) of 8 bits, and their classes in the data set, (N,).
        test: those that the indices of the test are for.
        classes: those of the task.
        split: for each part the indices of its images.
        change: for the images that something is learned from.

    """
    scale = Scale.of(train[0][torch.from_numpy(split["train"])])
    learned, tested = ((pixels, _numbered(labels, classes)) for pixels, labels in (train, test))
    parts: dict[str, Dataset] = {}
    for part, chosen in split.items():
        pixels, labels = tested if part == "test" else learned
        parts[part] = StoredImages(pixels, labels, torch.from_numpy(chosen), scale, None if part == "test" else change)
    return parts


def _numbered(labels: np.ndarray, classes: Sequence[int]) -> Tensor:
    """Return the position of each label among the classes, and −1 for those of other classes."""
    number = np.full(max(*classes, labels.max(initial=0)) + 1, -1)
    number[list(classes)] = np.arange(len(classes))
    return torch.from_numpy(number[labels])


def resized(pixels: Tensor, options: DataSettings) -> Tensor:
    """Return images of the size that is asked for, each pixel a weighted average of those in its place."""
    size = options.image_size
    if size == 0 or tuple(pixels.shape[2:]) == (size, size):
        return pixels
    # What torchvision's resize does, without the second that its import takes.
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
