"""The settings of the training that follows a search."""

from __future__ import annotations

from dataclasses import dataclass

from examples.nas_interleaving.options import Settings, SettingsError, choice, count, even, number, setting, text
from examples.nas_interleaving.stems import STEMS

SCHEDULES = ("cosine", "linear", "constant")


def _share(help_: str) -> float:
    """Return a field for a number from 0 up to 1, without 1."""
    return setting(
        0.0,
        help_,
        lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < 1,
        "a number from 0 up to 1, without 1",
    )


@dataclass(frozen=True)
class RetrainSettings(Settings):
    """Settings of the training of a derived network from scratch: the same budget for every architecture."""

    retrain_channels: int = even(8, "channels of a node")
    retrain_cells: int = count(3, "cells of the derived network", 2)
    retrain_stem: str = choice(
        "auto", f"form of the network's first layers: {', '.join(STEMS)}; auto: after the images' size", STEMS
    )
    retrain_epochs: int = count(15, "passes over training and validation data together")
    retrain_batch_size: int = count(32, "images per step")
    retrain_learning_rate: float = number(0.05, "of SGD with momentum")
    retrain_schedule: str = choice("cosine", f"how it falls to 0: {', '.join(SCHEDULES)} (not at all)", SCHEDULES)
    retrain_warmup_epochs: int = count(
        0, "epochs of growth, in equal steps, until the learning rate meets its schedule", 0
    )
    retrain_momentum: float = number(0.9, "of SGD", zero=True)
    retrain_weight_decay: float = number(3e-4, "of SGD", zero=True)
    retrain_grad_clip: float = number(5.0, "upper limit of the gradient's norm")
    retrain_label_smoothing: float = _share("share of each label that is spread over all classes")
    retrain_auxiliary: float = number(0.0, "weight of the loss of an auxiliary tower; 0: no tower", zero=True)
    retrain_drop_path: float = _share("share of the paths that are dropped in the last epoch, growing from 0")
    retrain_cutout: int = count(0, "side in pixels of the square that is cut out of every image; 0: none", 0)
    retrain_device: str = text("cpu", "where networks are trained, e.g. cuda")

    def __post_init__(self) -> None:
        """Check every field, and that the warm-up ends."""
        super().__post_init__()
        if self.retrain_warmup_epochs >= self.retrain_epochs:
            raise SettingsError(
                f"retrain_warmup_epochs = {self.retrain_warmup_epochs}, retrain_epochs = {self.retrain_epochs}: "
                "expected fewer of the former. Lower retrain_warmup_epochs, or raise retrain_epochs."
            )
