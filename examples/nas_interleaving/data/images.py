"""Data sets whose images can be changed at random while a network learns from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, get_worker_info

#: An image, (C, H, W), and its class.
Item = tuple[Tensor, Tensor]


class Images(Dataset, ABC):
    """A data set that gives its items plain, as they are tested, or changed at random, as they are learned from.

    Attributes:
        workers: processes for a loader to read with.

    """

    workers = 0

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return items as they are."""

    @abstractmethod
    def changed(self, indices: Sequence[int], generator: Generator) -> list[Item]:
        """Return items changed by draws from a generator."""

    def __getitem__(self, index: int) -> Item:
        """Return an item as it is."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # which ends a loop over the items
        return self.__getitems__([index])[0]


class Changed(Dataset):
    """The items of a data set, changed anew each time that they are read.

    The draws follow each other from the generator given. In a loader's worker they come from a generator of the
    worker's own, whose seed is the loader's: one that is copied into each process would repeat its draws there.
    """

    def __init__(self, images: Images, generator: Generator) -> None:
        self.images = images
        self.generator = generator
        self._of_worker: Generator | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        """Return a changed item."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return changed items."""
        return self.images.changed(indices, self._draws())

    def _draws(self) -> Generator:
        worker = get_worker_info()
        if worker is None:
            return self.generator
        if self._of_worker is None:
            self._of_worker = torch.Generator().manual_seed(worker.seed)
        return self._of_worker
