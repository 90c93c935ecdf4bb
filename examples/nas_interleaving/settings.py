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
    return _setting(default, text, lambda v: isinstance(v, int) and v >= least, f"an integer of at least {least}")


def _number(default: float, text: str, *, zero: bool = False) -> Any:
    if zero:
        return _setting(default, text, lambda v: 0 <= v < float("inf"), "a number of at least 0")
    return _setting(default, text, lambda v: 0 < v < float("inf"), "a positive number")


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
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise SettingsError(f"unknown settings {', '.join(unknown)}.")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def _texts(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(v, str) for v in value)


@dataclass(frozen=True)
class SearchSettings(Settings):
    """Settings of a search. K is the number of tasks."""

    tasks: tuple[str, ...] = _setting(
        ("digits:0-4", "digits:5-9"), "the learners' tasks, in the order in which they learn", _texts, "task names"
    )
    rounds: int = _count(2, "M, how many times the learners take their turns")
    steps: int = _count(60, "steps of the architecture")
    stage_steps: int = _count(1, "steps of each stage per step of the architecture")
    warmup: int = _count(10, "steps in which the stages train and the architecture waits", 0)
    proximity: float = _number(1.0, "λ, the weight of ‖W − W_prev‖²", zero=True)
    method: tuple[str, ...] = _setting(
        ("finite-difference",),
        "hypergradient method of all stages, or stage=method for one of them, e.g. neumann:terms=5 or "
        "learner_1_round_2=conjugate-gradient:max_steps=5,damping=0.1",
        _texts,
        "methods",
    )
    channels: int = _setting(
        4, "channels of a node", lambda v: isinstance(v, int) and v > 0 and v % 2 == 0, "an even number"
    )
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


@dataclass(frozen=True)
class RetrainSettings(Settings):
    """Settings of the training of a derived network from scratch: the same budget for every architecture."""

    retrain_channels: int = _setting(
        8, "channels of a node", lambda v: isinstance(v, int) and v > 0 and v % 2 == 0, "an even number"
    )
    retrain_cells: int = _count(3, "cells of the derived network", 2)
    retrain_epochs: int = _count(15, "passes over training and validation data together")
    retrain_batch_size: int = _count(32, "images per step")
    retrain_learning_rate: float = _number(0.05, "SGD with momentum; falls to 0 along a cosine")
    retrain_momentum: float = _number(0.9, "of SGD", zero=True)
    retrain_weight_decay: float = _number(3e-4, "of SGD", zero=True)
    retrain_grad_clip: float = _number(5.0, "upper limit of the gradient's norm")
