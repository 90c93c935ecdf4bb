"""The settings of a search and of the training that follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = TypeVar("Kind", bound="Settings")


class SettingsError(ValueError):
    """A setting is out of range, or unknown."""


def _setting(default: Any, text: str, check: Callable[[Any], bool], expected: str) -> Any:
    return field(default=default, metadata={"help": text, "check": check, "expected": expected})


def _count(default: int, text: str, least: int = 1) -> Any:
    return _setting(default, text, lambda v: _integer(v) and v >= least, f"an integer of at least {least}")


def _even(default: int, text: str) -> Any:
    return _setting(default, text, lambda v: _integer(v) and v > 0 and v % 2 == 0, "an even number")


def _number(default: float, text: str, *, zero: bool = False) -> Any:
    if zero:
        return _setting(default, text, lambda v: _real(v) and 0 <= v < float("inf"), "a number of at least 0")
    return _setting(default, text, lambda v: _real(v) and 0 < v < float("inf"), "a positive number")


def _texts(default: tuple[str, ...], text: str, example: str) -> Any:
    return _setting(default, text, _are_texts, f'a tuple of texts, e.g. ("{example}",)')


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, float) or _integer(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(v, str) for v in value)


@dataclass(frozen=True)
class Settings:
    """Settings that check themselves, and travel as JSON.

    Raises:
        SettingsError: one of them is out of range.

    """

    def __post_init__(self) -> None:
        """Check every field by its own rule."""
        for f in fields(self):
            value = getattr(self, f.name)
            if not f.metadata["check"](value):
                raise SettingsError(f"{f.name} = {value!r}: expected {f.metadata['expected']}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read settings from JSON's types."""
        if not isinstance(values, Mapping):
            raise SettingsError(f"expected settings by their names, got {values!r:.100}.")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise SettingsError(f"unknown settings {', '.join(unknown)}.")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


@dataclass(frozen=True)
class SearchSettings(Settings):
    """Settings of a search. K is the number of tasks."""

    tasks: tuple[str, ...] = _texts(
        ("digits:0-4", "digits:5-9"), "the learners' tasks, in the order in which they learn", "digits:0-4"
    )
    rounds: int = _count(2, "M, how many times the learners take their turns")
    steps: int = _count(60, "steps of the architecture")
    stage_steps: int = _count(1, "steps of each stage per step of the architecture")
    warmup: int = _count(10, "steps in which the stages train and the architecture waits", 0)
    proximity: float = _number(1.0, "λ, the weight of ‖W − W_prev‖²", zero=True)
    method: tuple[str, ...] = _texts(
        ("finite-difference",),
        "hypergradient method of all stages, or stage=method for one of them, e.g. neumann:terms=5 or "
        "learner_1_round_2=conjugate-gradient:max_steps=5,damping=0.1",
        "neumann",
    )
    channels: int = _even(4, "channels of a node")
    cells: int = _count(2, "cells of the network that is searched", 2)
    nodes: int = _count(4, "intermediate nodes of a cell")
    batch_size: int = _count(32, "images per task in a step")
    learning_rate: float = _number(0.05, "of the stages (SGD with momentum; falls to 1/25 along a cosine, as in DARTS)")
    momentum: float = _number(0.9, "of the stages", zero=True)
    weight_decay: float = _number(3e-4, "of the stages", zero=True)
    grad_clip: float = _number(5.0, "upper limit of the norm of a stage's gradient")
    architecture_learning_rate: float = _number(0.02, "of the architecture (Adam)")
    architecture_weight_decay: float = _number(1e-3, "of the architecture", zero=True)
    validate_every: int = _count(5, "steps between validations of all stages")
    seed: int = _count(0, "of weights, architecture and batches", 0)

    def __post_init__(self) -> None:
        """Check every field, and that the architecture moves at all."""
        super().__post_init__()
        if self.warmup >= self.steps:
            raise SettingsError(
                f"warmup = {self.warmup}, steps = {self.steps}: expected warmup to be smaller than steps, since the "
                "architecture moves in the steps after the warm-up only. Lower warmup, or raise steps."
            )


@dataclass(frozen=True)
class RetrainSettings(Settings):
    """Settings of the training of a derived network from scratch: the same budget for every architecture."""

    retrain_channels: int = _even(8, "channels of a node")
    retrain_cells: int = _count(3, "cells of the derived network", 2)
    retrain_epochs: int = _count(15, "passes over training and validation data together")
    retrain_batch_size: int = _count(32, "images per step")
    retrain_learning_rate: float = _number(0.05, "SGD with momentum; falls to 0 along a cosine")
    retrain_momentum: float = _number(0.9, "of SGD", zero=True)
    retrain_weight_decay: float = _number(3e-4, "of SGD", zero=True)
    retrain_grad_clip: float = _number(5.0, "upper limit of the gradient's norm")
