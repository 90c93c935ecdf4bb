"""Tasks: image classification problems, one for each learner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from examples.nas_interleaving.data.images import Changed, Images
from examples.nas_interleaving.data.labelled_images import DataError, check_labelled_images
from examples.nas_interleaving.data.names import classes_of, data_set_of
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.data.source import Source
from examples.nas_interleaving.data.sources import SOURCES

PARTS = ("train", "validation", "final_train", "test")


class TaskError(DataError):
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

    def in_order(self, part: str, size: int = 256) -> DataLoader:
        """Return batches of all images of a part as they are, the last of them smaller."""
        data = getattr(self, part)
        return DataLoader(data, size, num_workers=_workers(data))


def batches(data: Dataset, size: int, seed: int) -> DataLoader:
    """Return shuffled batches of exactly `size` items, in an order that depends on `seed` alone.

    `Images` are changed at random, by draws from the same generator as the order.
    """
    generator = torch.Generator().manual_seed(seed)
    read = Changed(data, generator) if isinstance(data, Images) else data
    return DataLoader(read, size, shuffle=True, drop_last=True, generator=generator, num_workers=_workers(data))


def _workers(data: Dataset) -> int:
    return data.workers if isinstance(data, Images) else 0


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


def load_tasks(names: Sequence[str], options: DataSettings | None = None) -> list[Task]:
    """Return the tasks of these names, e.g. `["digits", "fashion-mnist:0-4"]`. Each data set is read once.

    Args:
        names: of data sets in `SOURCES`, with all classes or some, such as `cifar100:0,3,7-20`.
        options: where the data are, and how much of them is used (default: `DataSettings()`).

    Raises:
        TaskError: a name is unknown or given twice, or its data are missing or corrupt.

    """
    options = DataSettings() if options is None else options
    sources: dict[str, Source] = {}
    tasks = []
    for name in names:
        data_set = data_set_of(name)
        if data_set not in SOURCES:
            raise TaskError(
                f"unknown task {name!r}; expected one of {', '.join(SOURCES)}, or some classes of one, such as "
                "digits:0-4."
            )
        try:
            if data_set not in sources:
                sources[data_set] = SOURCES[data_set](options)
            classes = classes_of(name, sources[data_set].classes)
            parts = sources[data_set].parts(classes)
        except DataError as error:
            raise TaskError(f"task {name!r}: {error}") from error
        tasks.append(Task(name, len(classes), **parts))
    check_compatible(tasks)
    return tasks


def check_compatible(tasks: Sequence[Task]) -> None:
    """Raise an error if there are no tasks, or two of one name. Their images and classes may differ."""
    if not tasks:
        raise TaskError("expected at least one task, got none.")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise TaskError(f"task {name!r} is given twice; expected a different name for each task.")
