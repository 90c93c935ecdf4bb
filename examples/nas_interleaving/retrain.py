"""Training of a derived network from scratch, and its test."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.network import Network
from examples.nas_interleaving.progress import progress
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.tasks import Task


@dataclass(frozen=True)
class TestResult:
    """What a derived network reaches on the test data of one task.

    Attributes:
        task: the task's name.
        accuracy: share of the test images that are classified correctly.
        loss: cross-entropy on them.
        train_loss: mean over the last epoch.
        parameters: size of the network.
        seconds: time of the training.

    """

    task: str
    accuracy: float
    loss: float
    train_loss: float
    parameters: int
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
    """Train the network of a genotype on one task from scratch, then test it once."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    network = Network(
        genotype, task.image_shape, settings.retrain_channels, settings.retrain_cells, task.classes
    ).train()
    loader = training_batches(task, settings, seed)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings.retrain_learning_rate,
        momentum=settings.retrain_momentum,
        weight_decay=settings.retrain_weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.retrain_epochs)
    train_loss = 0.0
    with progress(settings.retrain_epochs * len(loader), title) as bar:
        for _ in range(settings.retrain_epochs):
            train_loss = 0.0
            for images, labels in loader:
                loss = F.cross_entropy(network(images), labels)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), settings.retrain_grad_clip)
                optimizer.step()
                train_loss += loss.item() / len(loader)
                bar.update()
            scheduler.step()
            bar.set_postfix_str(f"loss {train_loss:.3f}", refresh=False)
    accuracy, test_loss = _test(network, task)
    size = sum(p.numel() for p in network.parameters())
    return TestResult(task.name, accuracy, test_loss, train_loss, size, round(time.perf_counter() - started, 3))


@torch.no_grad()
def _test(network: Network, task: Task) -> tuple[float, float]:
    network.eval()
    right, total, count = 0, 0.0, 0
    for images, labels in DataLoader(task.test, 256):
        scores = network(images)
        total += F.cross_entropy(scores, labels, reduction="sum").item()
        right += int((scores.argmax(1) == labels).sum())
        count += len(labels)
    return right / count, total / count
