"""Tasks that do not go with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from examples.nas_interleaving.data.images import Images, Item
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.tasks import PARTS, Task, check_compatible, load_tasks

#: Before a task's name: the same task with its pixels shuffled.
SHUFFLED = "shuffled:"

_SEED = 0


def load(names: Sequence[str], data: DataSettings) -> list[Task]:
    """Return the tasks of these names; `shuffled:NAME` has the images of NAME with their pixels shuffled.

    Raises:
        TaskError: a name is unknown or given twice, or its data cannot be had.

    """
    plain = [name.removeprefix(SHUFFLED) for name in names]
    loaded = {task.name: task for task in load_tasks(list(dict.fromkeys(plain)), data)}
    tasks = [
        with_shuffled_pixels(loaded[base]) if name.startswith(SHUFFLED) else loaded[base]
        for name, base in zip(names, plain, strict=True)
    ]
    check_compatible(tasks)
    return tasks


def with_shuffled_pixels(task: Task) -> Task:
    """Return the task with the pixels of all images in one other order, drawn once.

    What an image shows can be learnt as before, but not by looking at neighbouring pixels: an encoder of convolutions
    that serves this task serves no other.
    """
    _, height, width = task.image_shape
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(_SEED))
    parts: dict[str, Any] = {part: _Shuffled(getattr(task, part), order) for part in PARTS}
    return replace(task, name=SHUFFLED + task.name, **parts)


class _Shuffled(Images):
    """Images with their pixels in another order."""

    def __init__(self, images: Images, order: Tensor) -> None:
        self._images = images
        self._order = order
        self.workers = images.workers

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return items as they are."""
        return self._shuffled(self._images.__getitems__(indices))

    def changed(self, indices: Sequence[int], generator: Generator) -> list[Item]:
        """Return items that are changed before their pixels are shuffled."""
        return self._shuffled(self._images.changed(indices, generator))

    def _shuffled(self, items: list[Item]) -> list[Item]:
        return [(image.flatten(1)[:, self._order].view_as(image), label) for image, label in items]
