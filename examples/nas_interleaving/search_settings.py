"""The settings of a search."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from examples.nas_interleaving.operations import OPERATION_NAMES
from examples.nas_interleaving.options import (
    Settings,
    SettingsError,
    choice,
    count,
    counts,
    even,
    number,
    numbers,
    text,
    texts,
)

INTERLEAVING = "interleaving"
NO_TRANSFER = "no-transfer"
WARM_START = "warm-start"
JOINT = "joint"
DARTS = "darts"
DARTS_FIRST_ORDER = "darts-first-order"
RANDOM = "random"
ALGORITHMS = (INTERLEAVING, NO_TRANSFER, WARM_START, JOINT, DARTS, DARTS_FIRST_ORDER, RANDOM)

#: Algorithms in which a learner has one turn: more would not change what they compute.
ONE_ROUND = (NO_TRANSFER, JOINT, DARTS, DARTS_FIRST_ORDER, RANDOM)
ON_ONE_TASK = (DARTS, DARTS_FIRST_ORDER)

#: One step of each stage, as in the paper, but by double backward. A supernet has kinks at its very weights (ReLU at 0,
#: max pooling over equal background), where differences over a short way are wrong: see docs/nas.md.
ONE_STEP = "identity"

#: Settings that an algorithm does not read.
_UNREAD = {
    NO_TRANSFER: ("proximity", "task_weights"),
    WARM_START: ("proximity", "task_weights"),
    JOINT: ("proximity",),
    DARTS: ("proximity", "task_weights"),
    DARTS_FIRST_ORDER: ("proximity", "task_weights", "method"),
    INTERLEAVING: ("task_weights",),
}
_READ_BY_RANDOM = ("tasks", "algorithm", "nodes", "seed", "rounds")

PRECISIONS = ("float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "constant")
SPACES = ("darts", "pc-darts")


@dataclass(frozen=True)
class SearchSettings(Settings):
    """Settings of a search. K is the number of tasks."""

    tasks: tuple[str, ...] = texts(
        ("digits:0-4", "digits:5-9"), "the learners' tasks, in the order in which they learn", "digits:0-4"
    )
    algorithm: str = choice(
        INTERLEAVING,
        f"how the architecture is searched: {', '.join(ALGORITHMS)}; see docs/nas.md",
        ALGORITHMS,
    )
    rounds: int = count(2, "M, how many times the learners take their turns")
    steps: int = count(60, "steps of the architecture")
    epochs: int = count(0, "count them by passes over the shortest training set instead; 0: no", 0)
    stage_steps: int = count(1, "steps of each stage per step of the architecture")
    warmup: int = count(10, "steps in which the stages train and the architecture waits", 0)
    warmup_epochs: int = count(0, "count them by passes, together with epochs", 0)
    proximity: float = number(1.0, "λ, the weight of ‖W − W_prev‖²", zero=True)
    task_weights: tuple[float, ...] = numbers(
        (), "weight of each task's loss in joint training, one per task", "1/K for each"
    )
    method: tuple[str, ...] = texts(
        (ONE_STEP,),
        "hypergradient method of all stages, or stage=method for one of them, e.g. neumann:terms=5, "
        "unroll:product=central-differences or learner_1_round_2=conjugate-gradient:max_steps=5,damping=0.1",
        "neumann",
    )
    space: str = choice("darts", f"search space: {', '.join(SPACES)}", SPACES)
    partial_channels: int = count(
        0, "k; 1/k of the channels go through the operations; 0: 1 for darts, 4 for pc-darts", 0
    )
    channels: int = even(4, "channels of a node")
    cells: int = count(2, "cells of the network that is searched", 2)
    nodes: int = count(4, "intermediate nodes of a cell")
    shrink_cells: tuple[int, ...] = counts(
        (), "search in phases, as P-DARTS does: the cells of each phase, e.g. 5 11 17", "one phase with --cells"
    )
    shrink_operations: tuple[int, ...] = counts(
        (), "operations that an edge has left in each phase, e.g. 8 5 3", "all, in one phase"
    )
    skip_dropout: tuple[float, ...] = numbers(
        (),
        "dropout behind skip connections at the beginning of each phase, which fades out over it, e.g. 0 0.4 0.7",
        "none",
        below=1.0,
        zero=True,
    )
    max_skips: int = count(-1, "most skip connections of the normal cell that is decoded, as in P-DARTS; -1: any", -1)
    batch_size: int = count(32, "images per task in a step")
    learning_rate: float = number(0.05, "of the stages (SGD with momentum)")
    schedule: str = choice("cosine", f"of the stages' learning rate: {', '.join(SCHEDULES)}", SCHEDULES)
    min_learning_rate: float = number(0.002, "where a cosine ends", zero=True)
    momentum: float = number(0.9, "of the stages", zero=True)
    weight_decay: float = number(3e-4, "of the stages", zero=True)
    grad_clip: float = number(5.0, "upper limit of the norm of a stage's gradient; 0: none", zero=True)
    architecture_learning_rate: float = number(0.02, "of the architecture (Adam)")
    architecture_weight_decay: float = number(1e-3, "of the architecture", zero=True)
    precision: str = choice(
        "float32", f"of the networks' passes, by autocast: {', '.join(PRECISIONS)} (CUDA only)", PRECISIONS
    )
    device: str = text("cpu", "where the search runs, e.g. cuda")
    validate_every: int = count(5, "steps between validations of all stages")
    eigenvalue_steps: int = count(
        0, "at validations, Lanczos steps for the largest eigenvalue of the Hessian in the architecture; 0: none", 0
    )
    stop_on_skips: int = count(0, "stop when the normal cell has so many skip connections; 0: never", 0)
    stop_on_eigenvalue: float = number(
        0.0, "stop when the smoothed eigenvalue has grown by this factor, e.g. 1.33; 0: never", zero=True
    )
    seed: int = count(0, "of weights, architecture and batches", 0)

    def __post_init__(self) -> None:
        """Check every field, and what goes together."""
        super().__post_init__()
        self._check_lengths()
        self._check_algorithm()
        self._check_phases()
        if self.schedule == "cosine" and self.min_learning_rate > self.learning_rate:
            raise SettingsError(
                f"min_learning_rate = {self.min_learning_rate}, learning_rate = {self.learning_rate}: expected at most "
                "the latter. Lower min_learning_rate."
            )
        if self.precision == "float16" and self.device == "cpu":
            raise SettingsError("precision = 'float16', device = 'cpu': expected a CUDA device, or bfloat16.")
        if self.stop_on_eigenvalue and (self.stop_on_eigenvalue <= 1 or not self.eigenvalue_steps):
            raise SettingsError(
                f"stop_on_eigenvalue = {self.stop_on_eigenvalue}, eigenvalue_steps = {self.eigenvalue_steps}: expected "
                "a factor above 1, and Lanczos steps for the eigenvalue. Give eigenvalue_steps=10."
            )

    def _check_lengths(self) -> None:
        if self.warmup_epochs and not self.epochs:
            raise SettingsError(
                f"warmup_epochs = {self.warmup_epochs}, epochs = 0: expected both by epochs or both by steps. "
                "Give epochs, or warmup in place of warmup_epochs."
            )
        unit, length, wait = (
            ("epochs", self.epochs, self.warmup_epochs) if self.epochs else ("steps", self.steps, self.warmup)
        )
        if wait >= length:
            name = "warmup_epochs" if self.epochs else "warmup"
            raise SettingsError(
                f"{name} = {wait}, {unit} = {length}: expected {name} to be smaller than {unit}, since the "
                f"architecture moves in the {unit} after the warm-up only. Lower {name}, or raise {unit}."
            )

    def _check_algorithm(self) -> None:
        if self.algorithm in ON_ONE_TASK and len(self.tasks) > 1:
            raise SettingsError(
                f"algorithm = {self.algorithm!r}: expected one task, got {len(self.tasks)}. Give one by tasks, or let "
                "compare search on each task in turn."
            )
        if self.algorithm in ONE_ROUND and self.rounds > 1:
            raise SettingsError(
                f"algorithm = {self.algorithm!r}, rounds = {self.rounds}: expected rounds = 1: without a transfer "
                "earlier rounds have no influence on later ones. Give rounds=1."
            )
        if self.task_weights and len(self.task_weights) != len(self.tasks):
            raise SettingsError(
                f"task_weights = {self.task_weights}: expected one for each of the {len(self.tasks)} tasks."
            )

    def _check_phases(self) -> None:
        phases = len(self.shrink_operations)
        if len(self.shrink_cells) not in (0, phases) or len(self.skip_dropout) not in (0, max(phases, 1)):
            raise SettingsError(
                f"shrink_cells = {self.shrink_cells}, shrink_operations = {self.shrink_operations}, skip_dropout = "
                f"{self.skip_dropout}: expected as many numbers in each, one for each phase."
            )
        if phases and (self.stop_on_skips or self.stop_on_eigenvalue):
            raise SettingsError(
                "shrink_operations: expected none where stop_on_skips or stop_on_eigenvalue end a search."
            )
        if phases and self.shrink_operations[0] != len(OPERATION_NAMES):
            raise SettingsError(
                f"shrink_operations = {self.shrink_operations}: expected all {len(OPERATION_NAMES)} in the first phase."
            )
        if any(
            later > earlier for earlier, later in zip(self.shrink_operations, self.shrink_operations[1:], strict=False)
        ):
            raise SettingsError(f"shrink_operations = {self.shrink_operations}: expected numbers that do not grow.")
        if any(cells < 2 for cells in self.shrink_cells):
            raise SettingsError(f"shrink_cells = {self.shrink_cells}: expected at least 2 cells in each phase.")


def refuse_unread(algorithm: str, given: Iterable[str]) -> None:
    """Raise an error for settings that were given and that the algorithm would not read.

    Raises:
        SettingsError: there are such.

    """
    names = sorted(given)
    unread = [n for n in names if n not in _READ_BY_RANDOM] if algorithm == RANDOM else _UNREAD[algorithm]
    ignored = [n for n in names if n in unread]
    if ignored:
        raise SettingsError(f"algorithm = {algorithm!r}: it does not read {', '.join(ignored)}. Leave it out.")
