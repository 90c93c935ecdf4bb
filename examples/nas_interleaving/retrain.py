"""Training of a derived network from scratch, and its test."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.nas_interleaving.auxiliary import DropPath
from examples.nas_interleaving.counts import count_multiply_adds, count_parameters
from examples.nas_interleaving.data.augmentation import cutout
from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.hardware import OnDevice, find_device
from examples.nas_interleaving.network import Network
from examples.nas_interleaving.progress import progress
from examples.nas_interleaving.schedule import learning_rate_factor
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.tasks import Task


@dataclass(frozen=True)
class TestResult:
    """What a derived network reaches on the test data of one task.

    Attributes:
        task: the task's name.
        accuracy: share of the test images that are classified correctly.
        loss: cross-entropy on them.
        train_loss: mean over the last epoch, with all that training adds to it.
        train_accuracies: for each epoch, over its batches as they are trained on.
        parameters: size of the network, without what only training uses.
        multiply_adds: of scoring one image, in convolutions and matrix products.
        seconds: time of the training.

    """

    task: str
    accuracy: float
    loss: float
    train_loss: float
    train_accuracies: tuple[float, ...]
    parameters: int
    multiply_adds: int
    seconds: float


def training_batches(task: Task, settings: RetrainSettings, seed: int) -> DataLoader:
    """Return what a network is trained on.

    Raises:
        TaskError: the task has fewer images than one batch.

    """
    return task.batches("final_train", settings.retrain_batch_size, seed, option="retrain_batch_size")


def retrain(
    genotype: Genotype, task: Task, settings: RetrainSettings, seed: int, *, title: str = "retrain"
) -> TestResult:
    """Train the network of a genotype on one task from scratch, then test it once.

    The genotype may come from anywhere: a search on these or on other tasks, or a paper. Everything random comes from
    the seed.

    Raises:
        SettingsError: the device is not there.
        TaskError: the task has fewer images than one batch.

    """
    started = time.perf_counter()
    device = find_device(settings.retrain_device)
    torch.manual_seed(seed)
    network = Network(
        genotype,
        task.image_shape,
        settings.retrain_channels,
        settings.retrain_cells,
        task.classes,
        stem=settings.retrain_stem,
        auxiliary=settings.retrain_auxiliary > 0,
    ).to(device)
    loader = training_batches(task, settings, seed)
    training = _Training(network, settings, seed)
    epochs = []
    with progress(settings.retrain_epochs * len(loader), title) as bar:
        for epoch in range(settings.retrain_epochs):
            epochs.append(training.run_epoch(epoch, OnDevice(loader, device), bar.update))
            bar.set_postfix_str(f"loss {epochs[-1][0]:.3f}", refresh=False)
    accuracy, test_loss = _test(network, OnDevice(task.in_order("test"), device))
    return TestResult(
        task=task.name,
        accuracy=accuracy,
        loss=test_loss,
        train_loss=epochs[-1][0],
        train_accuracies=tuple(accuracy for _, accuracy in epochs),
        parameters=count_parameters(network),
        multiply_adds=count_multiply_adds(network, task.image_shape),
        seconds=round(time.perf_counter() - started, 3),
    )


class _Training:
    """A network, its optimizer, and draws of their own for what is dropped and cut out."""

    def __init__(self, network: Network, settings: RetrainSettings, seed: int) -> None:
        self._network = network
        self._settings = settings
        # Not the seed itself: the order of the batches is drawn from that.
        self._draws = torch.Generator().manual_seed(Random(seed).getrandbits(31))
        self._optimizer = torch.optim.SGD(
            network.parameters(),
            lr=settings.retrain_learning_rate,
            momentum=settings.retrain_momentum,
            weight_decay=settings.retrain_weight_decay,
        )
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, partial(learning_rate_factor, settings=settings)
        )

    def run_epoch(self, epoch: int, batches: OnDevice, done: Callable[[], object]) -> tuple[float, float]:
        """Train for one epoch; return its mean loss and accuracy."""
        settings = self._settings
        drop = DropPath(settings.retrain_drop_path * epoch / max(1, settings.retrain_epochs - 1), self._draws)
        total, right, count = 0.0, 0, 0
        self._network.train()
        for images, labels in batches:
            scores = self._network.training_scores(cutout(images, settings.retrain_cutout, self._draws), drop)
            loss = self._loss(scores, labels)
            self._optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self._network.parameters(), settings.retrain_grad_clip)
            self._optimizer.step()
            total += loss.item() / len(batches)
            right += int((scores[0].argmax(1) == labels).sum())
            count += len(labels)
            done()
        self._scheduler.step()
        return total, right / count

    def _loss(self, scores: list[Tensor], labels: Tensor) -> Tensor:
        weights = 1.0, self._settings.retrain_auxiliary
        smoothing = self._settings.retrain_label_smoothing
        losses = [
            weight * F.cross_entropy(found, labels, label_smoothing=smoothing)
            for weight, found in zip(weights, scores, strict=False)
        ]
        return torch.stack(losses).sum()


@torch.no_grad()
def _test(network: Network, batches: OnDevice) -> tuple[float, float]:
    network.eval()
    right, total, count = 0, 0.0, 0
    for images, labels in batches:
        scores = network(images)
        total += F.cross_entropy(scores, labels, reduction="sum").item()
        right += int((scores.argmax(1) == labels).sum())
        count += len(labels)
    return right / count, total / count
