"""The settings of the training that follows a search."""

from __future__ import annotations

from dataclasses import dataclass

from examples.nas_interleaving.options import Settings, count, even, number


@dataclass(frozen=True)
class RetrainSettings(Settings):
    """Settings of the training of a derived network from scratch: the same budget for every architecture."""

    retrain_channels: int = even(8, "channels of a node")
    retrain_cells: int = count(3, "cells of the derived network", 2)
    retrain_epochs: int = count(15, "passes over training and validation data together")
    retrain_batch_size: int = count(32, "images per step")
    retrain_learning_rate: float = number(0.05, "SGD with momentum; falls to 0 along a cosine")
    retrain_momentum: float = number(0.9, "of SGD", zero=True)
    retrain_weight_decay: float = number(3e-4, "of SGD", zero=True)
    retrain_grad_clip: float = number(5.0, "upper limit of the gradient's norm")
