"""The problems of a search: learners, each with a task, and the architecture above them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mlo
from examples.nas_interleaving.collapse import largest_eigenvalue, skip_connections
from examples.nas_interleaving.hardware import Precision
from examples.nas_interleaving.spaces import Architecture

ARCHITECTURE = "architecture"

Batch = tuple[Tensor, Tensor]


def encoder_weights(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a learner's parameters that is drawn towards the learner before it."""
    return {name: value for name, value in params.items() if name.startswith("encoder.")}


class Stage(mlo.Problem):
    """A network in training under the architecture.

    Args:
        validation: for each task that the network serves the batches of its validation data.
        precision: of the network's passes.

    """

    def __init__(
        self, *definition: Any, validation: Sequence[Iterable[Batch]], precision: Precision, **options: Any
    ) -> None:
        super().__init__(*definition, **options)
        self.validation = validation
        self.precision = precision

    def scores(self, images: Tensor, *task: int) -> Tensor:
        """Return the scores of images under the present architecture; a network of several tasks is told which."""
        return run_network(self, self.precision, images, self.deps.architecture.params, *task)

    @abstractmethod
    def tasks_in_turn(self) -> Iterable[tuple[Iterable[Batch], Sequence[int]]]:
        """Return for each task its validation data, and what `scores` is told with them."""

    def validation_step(self) -> dict[str, float]:
        """Return loss and accuracy over all validation data."""
        loss, right, count = 0.0, 0, 0
        for batches, task in self.tasks_in_turn():
            for images, labels in batches:
                scores = self.scores(images, *task)
                loss += F.cross_entropy(scores, labels, reduction="sum").item()
                right += int((scores.argmax(1) == labels).sum())
                count += len(labels)
        return {"loss": loss / count, "accuracy": right / count}


def run_network(network: Any, precision: Precision, *given: Any) -> Tensor:
    """Return the scores that a problem's network, or a view of it, gives."""
    with precision.region():
        scores = network(*given)
    return precision.restored(scores)


class LearnerStage(Stage):
    """One learner in one round: a task, and a pull towards the encoder of the learner before it if `proximity` > 0.

    Args:
        task: which of its tasks the network is to do; none for a network with one task.

    """

    def __init__(self, *definition: Any, proximity: float = 0.0, task: Sequence[int] = (), **options: Any) -> None:
        super().__init__(*definition, **options)
        self.proximity = proximity
        self.task = task

    def tasks_in_turn(self) -> Iterable[tuple[Iterable[Batch], Sequence[int]]]:
        """Return the one task."""
        return [(self.validation[0], self.task)]

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Return the training loss, with the pull."""
        images, labels = batch
        scores = self.scores(images, *self.task)
        fit = F.cross_entropy(scores, labels)
        logged = {"fit": fit, "accuracy": (scores.argmax(1) == labels).float().mean()}
        if self.proximity == 0 or "previous" not in self.deps:
            return {"loss": fit, **logged}
        distance = mlo.squared_distance(encoder_weights(self.params), encoder_weights(self.deps.previous.params))
        return {"loss": fit + self.proximity * distance, "squared_distance": distance, **logged}


class JointStage(Stage):
    """All tasks on one encoder at once: the weighted sum of their losses."""

    def __init__(self, *definition: Any, names: Sequence[str], weights: Sequence[float], **options: Any) -> None:
        super().__init__(*definition, **options)
        self.names = names
        self.weights = weights

    def tasks_in_turn(self) -> Iterable[tuple[Iterable[Batch], Sequence[int]]]:
        """Return all tasks."""
        return [(batches, (task,)) for task, batches in enumerate(self.validation)]

    def training_step(self, batch: Sequence[Batch]) -> dict[str, Tensor]:
        """Return the weighted sum; the loss of each task is logged under its name."""
        fits, right = [], []
        for task, (images, labels) in enumerate(batch):
            scores = self.scores(images, task)
            fits.append(F.cross_entropy(scores, labels))
            right.append((scores.argmax(1) == labels).float())
        loss = torch.stack([w * fit for w, fit in zip(self.weights, fits, strict=True)]).sum()
        return {"loss": loss, "accuracy": torch.cat(right).mean(), **dict(zip(self.names, fits, strict=True))}


class ArchitectureSearch(mlo.Problem):
    """The architecture: minimises validation losses.

    Args:
        held_out: a validation batch for the eigenvalue.
        eigenvalue_steps: Lanczos steps for it, 0 for none.
        precision: of the networks' passes.

    """

    def __init__(
        self, *definition: Any, held_out: Any, eigenvalue_steps: int, precision: Precision, **options: Any
    ) -> None:
        super().__init__(*definition, **options)
        self.held_out = held_out
        self.eigenvalue_steps = eigenvalue_steps
        self.precision = precision

    @abstractmethod
    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """Return the loss, and its parts to log."""

    def validation_step(self) -> dict[str, float]:
        """Return what tells of a collapse: skip connections, and the largest eigenvalue of the Hessian."""
        assert isinstance(self.module, Architecture)
        signals = {"skip_connections": float(skip_connections(self.module.weights()))}
        if self.eigenvalue_steps:
            with torch.enable_grad():
                loss = self.training_step(self.held_out)["loss"]
                parameters = list(self.module.parameters())
                signals["eigenvalue"] = largest_eigenvalue(loss, parameters, self.eigenvalue_steps)
        return signals


def architecture_of(engine: mlo.Engine) -> Architecture:
    """Return the architecture of a search."""
    module = engine.problems[ARCHITECTURE].module
    assert isinstance(module, Architecture)
    return module


class LearnersArchitecture(ArchitectureSearch):
    """Judged by learners with a task each: the sum of their validation losses."""

    def __init__(self, *definition: Any, tasks: Sequence[Sequence[int]], **options: Any) -> None:
        super().__init__(*definition, **options)
        self.tasks = tasks

    def training_step(self, batch: Sequence[Batch]) -> dict[str, Tensor]:
        """Return the sum; each learner's own loss is logged under its name."""
        losses = {}
        for (name, task), (images, labels) in zip(zip(self.depends_on, self.tasks, strict=True), batch, strict=True):
            scores = run_network(self.deps[name], self.precision, images, self.params, *task)
            losses[name] = F.cross_entropy(scores, labels)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


class JointArchitecture(ArchitectureSearch):
    """Judged by one network for all tasks: the weighted sum of its validation losses."""

    def __init__(self, *definition: Any, names: Sequence[str], weights: Sequence[float], **options: Any) -> None:
        super().__init__(*definition, **options)
        self.names = names
        self.weights = weights

    def training_step(self, batch: Sequence[Batch]) -> dict[str, Tensor]:
        """Return the weighted sum; the loss of each task is logged under its name."""
        (network,) = self.depends_on
        losses = [
            F.cross_entropy(run_network(self.deps[network], self.precision, images, self.params, task), labels)
            for task, (images, labels) in enumerate(batch)
        ]
        loss = torch.stack([w * each for w, each in zip(self.weights, losses, strict=True)]).sum()
        return {"loss": loss, **dict(zip(self.names, losses, strict=True))}
