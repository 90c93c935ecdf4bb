"""The handwritten digits that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.data.source import Source
from examples.nas_interleaving.data.splits import without_test
from examples.nas_interleaving.data.stored import resized, stored_parts

#: The images have the levels 0 to 16; so they take up the range of 8 bits, and keep their precision when resized.
_STEP = 15


class Digits(Source):
    """1,797 images, 1×8×8, of 10 classes (Alpaydin and Kaynak 1998, the test part). They are never augmented."""

    classes = 10

    def __init__(self, options: DataSettings) -> None:
        from sklearn.datasets import load_digits  # noqa: PLC0415  (slow to import, and only needed here)

        source = load_digits()
        self._options = options
        self._labels = source.target
        self._pixels = resized(torch.from_numpy(source.images * _STEP).to(torch.uint8).unsqueeze(1), options)

    def parts(self, classes: Sequence[int]) -> dict[str, Dataset]:
        """Return the parts of a task: 30 % of each class for the test, halves of the rest."""
        images = (self._pixels, self._labels)
        return stored_parts(images, images, classes, without_test(self._labels, classes, self._options), None)
