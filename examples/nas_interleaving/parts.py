"""What the problems of a search are made of: networks, optimizers, batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from examples.nas_interleaving.hardware import OnDevice, Precision, find_device
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.shared_network import SharedNetwork
from examples.nas_interleaving.spaces import Architecture, SearchSpace
from examples.nas_interleaving.stems import make_stem
from examples.nas_interleaving.supernet import Encoder, Learner
from examples.nas_interleaving.tasks import SideBySide, Task


class Parts:
    """Makes the parts of one search, all from its seed: the same calls in the same order give the same parts.

    Args:
        tasks: the learners' tasks.
        settings: of the search, counted in steps.
        space: the search space.

    Raises:
        SettingsError: the device is not there, or the space does not go with the width.

    """

    def __init__(self, tasks: Sequence[Task], settings: SearchSettings, space: SearchSpace) -> None:
        torch.manual_seed(settings.seed)
        self.tasks = tasks
        self.settings = settings
        self.device = find_device(settings.device)
        self.precision = Precision(settings.precision, self.device)
        self.architecture = Architecture(space).to(self.device)
        self._stems = [make_stem("auto", task.image_shape, settings.channels, derived=False) for task in tasks]
        self._encoder = Encoder(space, self._stems[0].width, settings.channels, settings.cells)
        self._draw = Random(settings.seed)

    def learners(self) -> list[Learner]:
        """Return a network for each task, all with one encoder: to be copied."""
        return [
            Learner(stem, self._encoder, task.classes).to(self.device)
            for stem, task in zip(self._stems, self.tasks, strict=True)
        ]

    def shared(self) -> SharedNetwork:
        """Return one network for all tasks."""
        return SharedNetwork(self._stems, self._encoder, [task.classes for task in self.tasks]).to(self.device)

    def training(self, module: nn.Module) -> dict[str, Any]:
        """Return the options of a stage that say how its network is trained."""
        settings = self.settings
        optimizer = torch.optim.SGD(
            module.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        scheduler = None
        if settings.schedule == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, settings.steps * settings.stage_steps, eta_min=settings.min_learning_rate
            )
        return {
            "optimizer": optimizer,
            "scheduler": scheduler,
            "steps": settings.stage_steps,
            "grad_clip": settings.grad_clip or None,
            "precision": self.precision,
        }

    def batches(self, part: str, task: Task) -> OnDevice:
        """Return batches of a part of a task's data.

        Raises:
            TaskError: the part is smaller than one batch.

        """
        return OnDevice(self._loader(part, task), self.device)

    def batches_of_all(self, part: str) -> OnDevice:
        """Return batches of a part of all tasks' data, drawn together.

        Raises:
            TaskError: the part is smaller than one batch.

        """
        return OnDevice(SideBySide([self._loader(part, task) for task in self.tasks]), self.device)

    def _loader(self, part: str, task: Task) -> DataLoader:
        return task.batches(part, self.settings.batch_size, self._draw.getrandbits(31), option="batch_size")

    def validation(self, tasks: Iterable[Task]) -> list[OnDevice]:
        """Return all validation data of some tasks."""
        return [OnDevice(task.in_order("validation"), self.device) for task in tasks]

    def choice(self) -> dict[str, Any]:
        """Return the options of the problem that chooses the architecture."""
        settings = self.settings
        return {
            "optimizer": torch.optim.Adam(
                self.architecture.parameters(),
                lr=settings.architecture_learning_rate,
                betas=(0.5, 0.999),
                weight_decay=settings.architecture_weight_decay,
            ),
            "data": self.batches_of_all("validation"),
            "warmup": settings.warmup,
            "held_out": next(iter(self.batches_of_all("validation"))),
            "eigenvalue_steps": settings.eigenvalue_steps,
            "precision": self.precision,
        }
