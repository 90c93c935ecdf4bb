"""What a data set gives to a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from examples.nas_interleaving.data.augmentation import ShiftAndFlip
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.data.splits import with_own_test
from examples.nas_interleaving.data.stored import resized, stored_parts


class Source(ABC):
    """A data set that was found and read.

    Attributes:
        classes: how many it has.

    """

    classes: int

    @abstractmethod
    def parts(self, classes: Sequence[int]) -> dict[str, Dataset]:
        """Return the parts of a task with these classes: train, validation, final_train and test."""


class StoredSource(Source):
    """A data set in memory with test images of its own.

    Args:
        train: images, (N, C, H, W) of 8 bits, and their classes, (N,).
        test: the same of the test images.
        padding: how many pixels a training image moves by at most.
        flip: whether it is mirrored at random.
        options: size, numbers of images, and whether training images are changed at all.

    """

    def __init__(
        self,
        train: tuple[Tensor, np.ndarray],
        test: tuple[Tensor, np.ndarray],
        classes: int,
        *,
        padding: int,
        flip: bool,
        options: DataSettings,
    ) -> None:
        self.classes = classes
        self._options = options
        self._train, self._test = ((resized(pixels, options), labels) for pixels, labels in (train, test))
        # A smaller image moves by as much of its width.
        share = self._train[0].shape[-1] / train[0].shape[-1]
        self._change = ShiftAndFlip(round(padding * share), flip) if options.augment else None

    def parts(self, classes: Sequence[int]) -> dict[str, Dataset]:
        """Return the parts of a task: halves for train and validation, both for final_train, the own test."""
        split = with_own_test(self._train[1], self._test[1], classes, self._options)
        return stored_parts(self._train, self._test, classes, split, self._change)
