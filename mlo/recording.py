"""The last optimizer steps of a stage, as they are needed to differentiate through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from mlo.optimizer_steps import OptimizerStep, State, differentiable_step, optimizer_state
from mlo.vectors import Vector

Batches = TypeVar("Batches")


class KeptGradients:
    """The `.grad` of parameters as the optimizer gets it: kept without a copy, and so only while it is not changed.

    Optimizers may write to it: SGD with Nesterov's momentum does.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Keep the present ones."""
        self.tensors = tuple(p.grad for p in parameters)
        self._versions = self._present_versions()

    def changed(self) -> bool:
        """Whether they were written to."""
        return self._versions != self._present_versions()

    def _present_versions(self) -> list[int | None]:
        return [None if t is None else t._version for t in self.tensors]


@dataclass(frozen=True)
class RecordedStep(Generic[Batches]):
    """What one optimizer step depended on, beside parameters and state.

    Attributes:
        batches: the batches and random states of its loss.
        update: the optimizer's formula with the options of that step.
        clip: upper limit of the gradient's norm, or `None`.
        gradients: those of the loss that the step saw, if they were kept.

    """

    batches: Batches
    update: OptimizerStep
    clip: float | None
    gradients: KeptGradients | None = None

    @property
    def known_gradients(self) -> tuple[Tensor | None, ...] | None:
        """The gradients of the loss at the step, `None` where they were not kept or were written to since."""
        return None if self.gradients is None or self.gradients.changed() else self.gradients.tensors

    def clipped(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return the gradients as the step saw them; differentiable, as `torch.nn.utils.clip_grad_norm_` is not."""
        if self.clip is None:
            return tuple(gradients)
        norms = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
        # torch's own constant, by which a clipped norm stays just below the limit
        factor = (self.clip / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        return tuple(None if g is None else g * factor for g in gradients)


@dataclass
class Recording(Generic[Batches]):
    """The last steps of one solve of a stage, with parameters and state kept before some of them.

    Memory: for N steps ⌈N / every⌉ copies of parameters and state, and references to the batches; for one step, to its
    gradients as well.

    Attributes:
        length: how many steps are recorded.
        every: parameters and state are kept before every so many steps.
        inputs: the values that the steps saw of the problems that the stage depends on.
        origins: for each parameter the position among the inputs of the tensor that it started from, or `None`
            where it went on from where it was.
        steps: the steps so far.
        starts: by step, parameters and state before it.

    """

    length: int
    every: int
    inputs: Vector
    origins: tuple[int | None, ...]
    steps: list[RecordedStep[Batches]] = field(default_factory=list)
    starts: dict[int, tuple[Vector, State]] = field(default_factory=dict)
    _versions: list[int] = field(default_factory=list)

    def add(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], batches: Batches, clip: float | None
    ) -> None:
        """Take note of the step that the optimizer is about to take."""
        position = len(self.steps)
        if position % self.every == 0:
            kept = tuple(p.detach().clone() for p in parameters)
            self.starts[position] = kept, optimizer_state(optimizer, parameters)
        # Of several steps they would be as many vectors; clipped, and sparse, they are not what products begin with.
        alone = (
            self.length == 1 and clip is None and not any(p.grad is not None and p.grad.is_sparse for p in parameters)
        )
        gradients = KeptGradients(parameters) if alone else None
        self.steps.append(RecordedStep(batches, differentiable_step(optimizer, parameters), clip, gradients))

    def close(self, parameters: Sequence[Tensor]) -> None:
        """Take note of where the step has led."""
        self._versions = [p._version for p in parameters]

    def ends_at(self, parameters: Sequence[Tensor]) -> bool:
        """Whether all steps were taken, and have led to the present values of the parameters."""
        return len(self.steps) == self.length and self._versions == [p._version for p in parameters]
