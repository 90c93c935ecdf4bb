"""How the learning rate of a retraining goes from epoch to epoch."""

from __future__ import annotations

import math

from examples.nas_interleaving.settings import RetrainSettings


def learning_rate_factor(epoch: int, settings: RetrainSettings) -> float:
    """Return by what the learning rate of an epoch, counted from 0, is multiplied.

    It falls from 1 towards 0, along a cosine or a line, or stays; during the warm-up it also grows in equal steps.
    """
    done = epoch / settings.retrain_epochs
    falling = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    warm = min(1.0, (epoch + 1) / settings.retrain_warmup_epochs) if settings.retrain_warmup_epochs else 1.0
    return warm * falling[settings.retrain_schedule]
