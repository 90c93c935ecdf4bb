"""Products from directional derivatives of the loss's gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.autodiff import gradients
from mlo.losses import unreached
from mlo.products.base import Linearisation
from mlo.stage_function import StageFunction, leaves
from mlo.vectors import Vector, zeros_like


@dataclass(frozen=True)
class LossGradients:
    """L with ∂L/∂θ and ∂L/∂x at one point, `None` where the loss does not reach."""

    loss: float
    theta: tuple[Tensor | None, ...]
    x: tuple[Tensor | None, ...]


def loss_gradients(stage: StageFunction, theta: Vector, x: Vector) -> LossGradients:
    """Return the loss and its gradients in those tensors that need one, by one forward and one reverse pass."""
    with torch.enable_grad(), stage.evaluation(theta, x) as evaluate:
        loss = evaluate()
        found = gradients([loss], (*theta, *x))
        return LossGradients(loss.item(), found[: len(theta)], found[len(theta) :])


class DirectionalLinearisation(Linearisation):
    """Products as derivatives of ∂L/∂θ and ∂L/∂x along a direction in θ.

    With D the derivative along s∘v (s the stage's signs) and ρ its weight decays, Hᵀv = D ∂L/∂θ + ρ∘v and
    Gᵀv = D ∂L/∂x, if ∂²L/∂θ² is symmetric.
    """

    def __init__(
        self, stage: StageFunction, solution: Sequence[Tensor], inputs: Sequence[Tensor], needed: Sequence[bool]
    ) -> None:
        """Evaluate g once, to find what takes part."""
        self.stage, self.solution = stage, tuple(solution)
        self.inputs, self.needed = tuple(inputs), tuple(needed)
        raw = loss_gradients(stage, leaves(solution), leaves(inputs, False)).theta
        if all(t is None for t in raw):
            raise unreached(stage.title)
        self.gradient = tuple(
            None if t is None else sign * t + decay * theta.detach()
            for t, theta, sign, decay in zip(raw, solution, stage.signs, stage.weight_decays, strict=True)
        )
        self._signs = self._numbers(stage.signs)
        self._decays = self._numbers(stage.weight_decays)

    @abstractmethod
    def derivative(self, direction: Vector, want_inputs: bool) -> tuple[Vector, tuple[Tensor | None, ...]]:
        """Return the derivatives of ∂L/∂θ and, if wanted, of ∂L/∂x along a direction with a tensor for all of θ."""

    def product(self, vector: Sequence[Tensor]) -> Vector:
        """Return Hᵀ·vector."""
        along = self._everywhere([s * v for s, v in zip(self._signs, vector, strict=True)])
        return self._with_decay(self.taking_part(self.derivative(along, want_inputs=False)[0]), vector)

    def transposed_product(self, vector: Sequence[Tensor]) -> Vector:
        """Return H·vector."""
        changes = self.taking_part(self.derivative(self._everywhere(vector), want_inputs=False)[0])
        return self._with_decay([s * t for s, t in zip(self._signs, changes, strict=True)], vector)

    def mixed_product(self, vector: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return Gᵀ·vector."""
        along = self._everywhere([s * v for s, v in zip(self._signs, vector, strict=True)])
        return self.derivative(along, want_inputs=True)[1]

    def _with_decay(self, changes: Sequence[Tensor], vector: Sequence[Tensor]) -> Vector:
        return tuple(t + decay * v if decay else t for t, v, decay in zip(changes, vector, self._decays, strict=True))

    def _everywhere(self, vector: Sequence[Tensor]) -> Vector:
        given = iter(vector)
        zero = zeros_like(self.solution)
        return tuple(z if g is None else next(given) for g, z in zip(self.gradient, zero, strict=True))

    def _numbers(self, values: Sequence[float]) -> tuple[float, ...]:
        return tuple(value for value, g in zip(values, self.gradient, strict=True) if g is not None)
