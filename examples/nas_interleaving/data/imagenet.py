"""ImageNet, or any photographs in its layout: a folder for each class below train/ and val/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from examples.nas_interleaving.data.images import Images, Item
from examples.nas_interleaving.data.labelled_images import DataError
from examples.nas_interleaving.data.missing import missing
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.data.source import Source
from examples.nas_interleaving.data.splits import with_own_test
from examples.nas_interleaving.data.vision import torchvision

_SIZE = 224
#: Mean and standard deviation of red, green and blue over ImageNet, from 0 to 1, as they are in common use.
_SCALE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_PARTS = ("train", "val")

View = Callable[[Any], Tensor]


class ImageNet(Source):
    """Photographs (Deng et al. 2009), read when they are needed; classes are in the order of their folders' names."""

    def __init__(self, options: DataSettings) -> None:
        self._options = options
        self._folder = Path(options.data, "imagenet")
        if not all((self._folder / part).is_dir() for part in _PARTS):
            expected = "the folders train and val, with a folder of images for each class in both"
            remedy = "ImageNet is given out at https://image-net.org on request, and cannot be downloaded from here."
            raise missing([self._folder], expected, remedy, options, by_download="")
        names = {part: self._names(part) for part in _PARTS}
        if names["train"] != names["val"]:
            odd = sorted(set(names["train"]) ^ set(names["val"]))
            raise DataError(
                f"{self._folder}: expected the same classes in train and val; in only one: {', '.join(odd[:3])}."
            )
        self._names_of_classes = names["train"]
        self.classes = len(self._names_of_classes)

    def _names(self, part: str) -> list[str]:
        return sorted(entry.name for entry in (self._folder / part).iterdir() if entry.is_dir())

    def parts(self, classes: Sequence[int]) -> dict[str, Dataset]:
        """Return the parts of a task: halves of train/ for train and validation, val/ for the test."""
        found = {part: self._find(part, classes) for part in _PARTS}
        labels = {part: np.array(classes)[files.targets] for part, files in found.items()}
        split = with_own_test(labels["train"], labels["val"], classes, self._options)
        plain, changed = views(self._options.image_size or _SIZE)
        return {
            part: ImageFiles(
                found["val" if part == "test" else "train"],
                chosen,
                plain,
                changed if self._options.augment and part != "test" else None,
                self._options.workers,
            )
            for part, chosen in split.items()
        }

    def _find(self, part: str, classes: Sequence[int]) -> Any:
        """List the files of some classes, numbered in their order."""
        numbers = {self._names_of_classes[c]: position for position, c in enumerate(classes)}

        class Chosen(torchvision().datasets.ImageFolder):  # type: ignore[misc]
            def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
                return list(numbers), numbers

        try:
            return Chosen(self._folder / part)
        except OSError as error:
            raise DataError(f"{self._folder / part}: {error}") from error


def views(size: int) -> tuple[View, View]:
    """Return how an image is looked at: at rest, and at random, as DARTS does with ImageNet.

    At rest it is the centre of the image whose shorter side was scaled to 8/7 of the size (256 for 224). At random it
    is a piece of 8 to 100 % of the area, scaled to the size, mirrored half of the time, in changed colours.
    """
    v2 = torchvision().transforms.v2
    finish = [v2.ToImage(), v2.ToDtype(torch.get_default_dtype(), scale=True), v2.Normalize(**_SCALE)]
    plain = [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)]
    changed = [
        v2.RandomResizedCrop(size),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2),
    ]
    return v2.Compose([*plain, *finish]), v2.Compose([*changed, *finish])


class ImageFiles(Images):
    """Some of the images of an `ImageFolder` without transforms, read when they are asked for."""

    def __init__(self, files: Any, index: np.ndarray, plain: View, changed: View | None, workers: int) -> None:
        self._files = files
        self._index = index
        self._plain = plain
        self._changed = changed
        self.workers = workers

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._index)

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return items as they are."""
        return [self._item(index, self._plain) for index in indices]

    def changed(self, indices: Sequence[int], generator: Generator) -> list[Item]:
        """Return items changed by draws from a generator."""
        if self._changed is None:
            return self.__getitems__(indices)
        items = []
        # The transforms draw from PyTorch's global generator, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            for index in indices:
                torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
                items.append(self._item(index, self._changed))
        return items

    def _item(self, index: int, view: View) -> Item:
        file, number = self._files.samples[self._index[index]]
        try:
            image = self._files.loader(file)
        except (OSError, SyntaxError) as error:  # the latter is how Pillow speaks of a broken PNG
            raise DataError(f"{file} cannot be read: {error}") from error
        return view(image), torch.tensor(number)
