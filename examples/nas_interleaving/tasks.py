"""Tasks: image classification problems, one for each learner."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from examples.nas_interleaving.labelled_images import DataError, check_labelled_images

PARTS = ("train", "validation", "final_train", "test")

_SPLIT_SEED = 0
_TEST_SHARE = 0.3


class TaskError(ValueError):
    """A task's name cannot be understood, its data cannot be used, or tasks do not go together."""


@dataclass(frozen=True)
class Task:
    """Labelled images in four parts. Every item of a part is (image of shape (C, H, W), class from 0).

    Attributes:
        name: for tables and plots.
        classes: number of classes.
        train: trains a learner's weights during the search.
        validation: judges the architecture during the search.
        final_train: trains the network that is derived (commonly the two above together).
        test: untouched until the end.

    Raises:
        TaskError: the data are not such images. A `TensorDataset` is checked as a whole, any other data set by
            items from its whole length.

    """

    name: str
    classes: int
    train: Dataset
    validation: Dataset
    final_train: Dataset
    test: Dataset

    def __post_init__(self) -> None:
        """Check the four parts."""
        if not isinstance(self.classes, int) or self.classes < 2:
            raise TaskError(f"task {self.name!r}: classes = {self.classes!r}: expected an integer of at least 2.")
        for part in PARTS:
            self._check(part)

    def _check(self, part: str) -> None:
        try:
            check_labelled_images(getattr(self, part), self.classes)
        except DataError as error:
            raise TaskError(f"task {self.name!r}, {part}: {error}") from error

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return tuple(self.train[0][0].shape)

    def batches(self, part: str, size: int, seed: int, *, option: str) -> DataLoader:
        """Return `batches` of a part.

        Raises:
            TaskError: the part is smaller than one batch; the message names the option that sets the size.

        """
        data = getattr(self, part)
        if len(data) < size:
            raise TaskError(
                f"task {self.name!r} has {len(data)} images in {part}; expected at least one batch of {option} = "
                f"{size}. Lower {option}."
            )
        return batches(data, size, seed)


def batches(data: Dataset, size: int, seed: int) -> DataLoader:
    """Return shuffled batches of exactly `size` items, in an order that depends on `seed` alone."""
    return DataLoader(data, size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))


class SideBySide:
    """Batches of several loaders drawn together: the item is a tuple with one batch of each.

    A pass ends with the shortest loader. The others shuffle anew for the next pass.
    """

    def __init__(self, loaders: Sequence[DataLoader]) -> None:
        self._loaders = loaders

    def __len__(self) -> int:
        """Return the number of items of a pass."""
        return min(len(loader) for loader in self._loaders)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Run through the loaders together."""
        return zip(*self._loaders, strict=False)


def load_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names, e.g. `["digits:0-4", "digits:5-9"]`.

    Raises:
        TaskError: a name is unknown or given twice, or the tasks' images differ in shape.

    """
    tasks = [_load(name) for name in names]
    check_compatible(tasks)
    return tasks


def check_compatible(tasks: Sequence[Task]) -> None:
    """Raise an error if there are no tasks, two of one name, or tasks that one encoder cannot serve."""
    if not tasks:
        raise TaskError("expected at least one task, got none.")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise TaskError(f"task {name!r} is given twice; expected a different name for each task.")
    for task in tasks[1:]:
        if task.image_shape != tasks[0].image_shape:
            raise TaskError(
                f"task {task.name!r} has images of shape {task.image_shape}, task {tasks[0].name!r} of shape "
                f"{tasks[0].image_shape}; expected one shape, since the learners share an encoder. Resize one of them."
            )


def _load(name: str) -> Task:
    match = re.fullmatch(r"digits(?::([\d,\-]+))?", name)
    if match is None:
        raise TaskError(f"unknown task {name!r}; expected digits, or some of its classes such as digits:0-4.")
    return digits(name, _classes(name, match[1] or "0-9"))


def _classes(name: str, text: str) -> list[int]:
    """Read class numbers such as "0-4" or "1,3,7-9"."""
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d)(?:-(\d))?", part)
        if match is None:
            raise TaskError(f"task {name!r}: expected classes such as 0-4 or 1,3,7; got {part!r}.")
        chosen += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(chosen)) < 2 or len(set(chosen)) < len(chosen):
        raise TaskError(f"task {name!r}: expected at least two classes, each once; got {chosen}.")
    return chosen


def digits(name: str, classes: Sequence[int]) -> Task:
    """Return some classes of the handwritten digits that scikit-learn ships: 8×8 images in 16 grey levels.

    Of each class 30 % are for the test, half of the rest for training and half for validation. The split is the
    same in every run.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  (slow to import, and only needed here)

    source = load_digits()
    draw = np.random.default_rng(_SPLIT_SEED)
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for digit in classes:
        found = draw.permutation(np.flatnonzero(source.target == digit))
        test = round(_TEST_SHARE * len(found))
        half = test + (len(found) - test) // 2
        for part, chosen in zip(parts, (found[test:half], found[half:], found[:test]), strict=True):
            parts[part].append(chosen)
    index = {part: np.concatenate(chosen) for part, chosen in parts.items()}
    index["final_train"] = np.concatenate([index["train"], index["validation"]])
    pixels = source.images[index["train"]]
    scaled = torch.tensor((source.images - pixels.mean()) / pixels.std(), dtype=torch.get_default_dtype())
    images = scaled.unsqueeze(1)
    labels = torch.tensor([classes.index(digit) if digit in classes else -1 for digit in source.target])
    return Task(name, len(classes), **{part: TensorDataset(images[i], labels[i]) for part, i in index.items()})
