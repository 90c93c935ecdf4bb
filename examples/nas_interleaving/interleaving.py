"""Interleaving learning as problems: K·M chained stages under one architecture (arXiv 2103.07018).

Learner k in round m has encoder weights W and a head H and solves

    W*(A), H* = argmin  L(A, W, H; D_k^train) + λ ‖W − W_prev*(A)‖²,

where W_prev is the encoder of the learner before it: k − 1 in the same round, or the last learner of the round
before. The architecture A minimises the sum of the last round's validation losses.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mlo
from examples.nas_interleaving.methods import stage_methods
from examples.nas_interleaving.settings import SearchSettings
from examples.nas_interleaving.supernet import Architecture, Encoder, Learner
from examples.nas_interleaving.tasks import SideBySide, Task, check_compatible

ARCHITECTURE = "architecture"


def stage_name(learner: int, round_: int) -> str:
    """Return the name of a stage; learners and rounds count from 1."""
    return f"learner_{learner}_round_{round_}"


def stage_names(learners: int, rounds: int) -> list[str]:
    """Return the stages in the order in which they learn."""
    return [stage_name(k, m) for m in range(1, rounds + 1) for k in range(1, learners + 1)]


def encoder_weights(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a learner's parameters that is drawn towards the learner before it."""
    return {name: value for name, value in params.items() if name.startswith("encoder.")}


class LearnerStage(mlo.Problem):
    """One learner in one round."""

    def __init__(self, name: str, module: Learner, *, proximity: float, validation: DataLoader, **options: Any) -> None:
        super().__init__(name, module, **options)
        self.proximity = proximity
        self.validation = validation

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """Return the training loss with the pull towards the encoder of the learner before."""
        images, labels = batch
        scores = self(images, self.deps.architecture.params)
        fit = F.cross_entropy(scores, labels)
        logged = {"fit": fit, "accuracy": (scores.argmax(1) == labels).float().mean()}
        if "previous" not in self.deps:
            return {"loss": fit, **logged}
        distance = mlo.squared_distance(encoder_weights(self.params), encoder_weights(self.deps.previous.params))
        return {"loss": fit + self.proximity * distance, "squared_distance": distance, **logged}

    def validation_step(self) -> dict[str, float]:
        """Return loss and accuracy over the validation data."""
        loss, right, count = 0.0, 0, 0
        for images, labels in self.validation:
            scores = self(images, self.deps.architecture.params)
            loss += F.cross_entropy(scores, labels, reduction="sum").item()
            right += int((scores.argmax(1) == labels).sum())
            count += len(labels)
        return {"loss": loss / count, "accuracy": right / count}


class ArchitectureSearch(mlo.Problem):
    """The architecture: minimises the validation losses of the last round's learners, summed."""

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        """Return the sum; each learner's own loss is logged under its name."""
        losses = {}
        for name, (images, labels) in zip(self.depends_on, batch, strict=True):
            losses[name] = F.cross_entropy(self.deps[name](images, self.params), labels)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def build_engine(tasks: Sequence[Task], settings: SearchSettings) -> mlo.Engine:
    """Return the engine of an interleaving search; K = 1 and M = 1 is plain DARTS.

    All encoders start from the same weights, and so do all heads of one task.

    Raises:
        TaskError: there are no tasks, they do not go together, or one is smaller than a batch.
        SettingsError: a method, or the stage that it is for, is unknown.

    """
    check_compatible(tasks)
    torch.manual_seed(settings.seed)
    architecture = Architecture(settings.nodes)
    encoder = Encoder(tasks[0].image_shape[0], settings.channels, settings.cells, settings.nodes)
    first_round = [Learner(copy.deepcopy(encoder), task.classes) for task in tasks]
    names = stage_names(len(tasks), settings.rounds)
    methods = stage_methods(settings.method, names)
    draw = Random(settings.seed)
    problems: list[mlo.Problem] = []
    for position, name in enumerate(names):
        k = position % len(tasks)
        roles = {ARCHITECTURE: ARCHITECTURE}
        if position > 0:
            roles["previous"] = names[position - 1]
        problems.append(_stage(name, tasks[k], copy.deepcopy(first_round[k]), roles, methods[name], draw, settings))
    problems.append(_search(tasks, architecture, names[-len(tasks) :], draw, settings))
    return mlo.Engine(problems)


def _stage(
    name: str,
    task: Task,
    learner: Learner,
    roles: Mapping[str, str],
    method: mlo.HypergradientMethod,
    draw: Random,
    settings: SearchSettings,
) -> LearnerStage:
    optimizer = torch.optim.SGD(
        learner.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    return LearnerStage(
        name,
        learner,
        proximity=settings.proximity,
        validation=DataLoader(task.validation, 256),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, settings.steps * settings.stage_steps, eta_min=settings.learning_rate / 25
        ),
        data=task.batches("train", settings.batch_size, draw.getrandbits(31), option="batch_size"),
        depends_on=roles,
        steps=settings.stage_steps,
        hypergradient=method,
        grad_clip=settings.grad_clip,
    )


def _search(
    tasks: Sequence[Task], architecture: Architecture, last_round: Sequence[str], draw: Random, settings: SearchSettings
) -> ArchitectureSearch:
    loaders = [
        task.batches("validation", settings.batch_size, draw.getrandbits(31), option="batch_size") for task in tasks
    ]
    return ArchitectureSearch(
        ARCHITECTURE,
        architecture,
        optimizer=torch.optim.Adam(
            architecture.parameters(),
            lr=settings.architecture_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=settings.architecture_weight_decay,
        ),
        data=SideBySide(loaders),
        depends_on=last_round,
        warmup=settings.warmup,
    )
