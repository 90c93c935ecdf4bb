"""Products from directional derivatives of the loss's gradient."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlo.autodiff import filled
from mlo.errors import MloWarning
from mlo.losses import unreached
from mlo.products.base import Linearisation
from mlo.reverse_pass import gradients
from mlo.stage_function import StageFunction, leaves
from mlo.vectors import Vector, dot, norm, rounding_unit, zeros_like

# Central differences of small float32 networks with kinks were seen to differ by 10 %; a stop-gradient that matters
# changes more.
_SYMMETRIC = 0.15
# How much shorter the way is by which a difference is looked at again.
NEARER = 0.25


class LossGradients(NamedTuple):
    """∂L/∂θ and ∂L/∂x at one point, `None` where the loss does not reach."""

    theta: tuple[Tensor | None, ...]
    x: tuple[Tensor | None, ...]


def loss_gradients(stage: StageFunction, theta: Vector, x: Vector, *, seldom: bool = False) -> LossGradients:
    """Return the gradients of the loss in those tensors that need one, by one forward and one reverse pass.

    What is needed `seldom` is not worth being compiled.
    """
    at = (*theta, *x)
    with torch.enable_grad(), stage.evaluation(theta, x) as evaluate:
        found = gradients((evaluate(),), at) if seldom else evaluate.value_and_gradients(at)[1]
        return LossGradients(found[: len(theta)], found[len(theta) :])


class DirectionalLinearisation(Linearisation):
    """Products as derivatives of ∂L/∂θ and ∂L/∂x along a direction in θ.

    With D the derivative along s∘v (s the stage's signs) and ρ its weight decays, Hᵀv = D ∂L/∂θ + ρ∘v and
    Gᵀv = D ∂L/∂x, if ∂²L/∂θ² is symmetric.
    """

    def __init__(
        self,
        stage: StageFunction,
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        known: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Evaluate ∂L/∂θ once where it is not given, to find what takes part."""
        self.stage, self.solution = stage, tuple(solution)
        self.inputs, self.needed = tuple(inputs), tuple(needed)
        raw = known or loss_gradients(stage, leaves(solution), leaves(inputs, False)).theta
        if all(t is None for t in raw):
            raise unreached(stage.title)
        self.gradient = tuple(
            None if t is None else sign * t + decay * theta.detach()
            for t, theta, sign, decay in zip(raw, solution, stage.signs, stage.weight_decays, strict=True)
        )
        self._signs = self._numbers(stage.signs)
        self._decays = self._numbers(stage.weight_decays)

    @abstractmethod
    def derivative(self, direction: Vector, *, in_theta: bool) -> tuple[Tensor | None, ...]:
        """Return the derivative of ∂L/∂θ, or else of ∂L/∂x, along a direction with a tensor for all of θ."""

    def derivative_nearer(self, direction: Vector) -> tuple[Tensor | None, ...]:
        """Return the derivative of ∂L/∂x over a shorter way, where there is a way."""
        return self.derivative(direction, in_theta=False)

    def product(self, vector: Sequence[Tensor]) -> Vector:
        """Return Hᵀ·vector."""
        along = self._everywhere([s * v for s, v in zip(self._signs, vector, strict=True)])
        return self._with_decay(self._changes(along), vector)

    def transposed_product(self, vector: Sequence[Tensor]) -> Vector:
        """Return H·vector."""
        changes = self._changes(self._everywhere(vector))
        return self._with_decay([s * t for s, t in zip(self._signs, changes, strict=True)], vector)

    def mixed_product(self, vector: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return Gᵀ·vector."""
        along = self._everywhere([s * v for s, v in zip(self._signs, vector, strict=True)])
        found = self.derivative(along, in_theta=False)
        if self.stage.symmetry_check_due():
            warn_of_asymmetry(
                self.stage, self.solution, self.inputs, along, found, lambda: self.derivative_nearer(along)
            )
        return found

    def _changes(self, direction: Vector) -> Vector:
        return self.taking_part(filled(self.derivative(direction, in_theta=True), self.solution))

    def _with_decay(self, changes: Sequence[Tensor], vector: Sequence[Tensor]) -> Vector:
        return tuple(t + decay * v if decay else t for t, v, decay in zip(changes, vector, self._decays, strict=True))

    def _everywhere(self, vector: Sequence[Tensor]) -> Vector:
        given = iter(vector)
        zero = zeros_like(self.solution)
        return tuple(z if g is None else next(given) for g, z in zip(self.gradient, zero, strict=True))

    def _numbers(self, values: Sequence[float]) -> tuple[float, ...]:
        return tuple(value for value, g in zip(values, self.gradient, strict=True) if g is not None)


def shift_length(tensors: Sequence[Tensor]) -> float:
    """Return the length of the shift of a central difference that suits tensors of this size and dtype.

    It is max(∛u/32, 32u)·max(1, ‖θ‖) with u the rounding unit: the cube root balances the error of the difference
    with that of rounding, 1/32 is what small networks were measured to want, and 32u keeps the shift of a 16-bit
    weight above its own rounding.
    """
    return relative_shift_length(tensors) * max(1.0, norm(tensors))


def relative_shift_length(tensors: Sequence[Tensor]) -> float:
    """Return `shift_length` / max(1, ‖θ‖)."""
    unit = rounding_unit(tensors)
    return float(max(unit ** (1 / 3) / 32, 32 * unit))


def warn_of_asymmetry(
    stage: StageFunction,
    solution: Vector,
    inputs: Vector,
    direction: Sequence[Tensor],
    change: Sequence[Tensor | None],
    nearer: Callable[[], Sequence[Tensor | None]],
) -> None:
    """Warn if a derivative of ∂L/∂x along θ is not the one of ∂L/∂θ along x.

    The two are equal for every function, but not for a loss with a stop-gradient inside: that holds an argument fixed
    in each gradient, and lets it change from one point to the other. Both sides are taken along `direction` in θ and
    along u = `change` in x, the second by a central difference of ∂L/∂θ. Kinks (of ReLU, of pooling) and rounding
    separate them too; then a difference over a shorter way, which `nearer` gives for the first, does not agree with
    that over the longer one, and nothing is said.

    Cost: two forward and two reverse passes, four more if the sides differ.
    """
    length, size = norm(direction), norm([c for c in change if c is not None])
    if not (0 < length < math.inf and 0 < size < math.inf):
        return
    moved = [t for t, c in zip(inputs, change, strict=True) if c is not None]
    shift = shift_length(moved) / size
    expected = size / length
    slope = _slope(stage, solution, inputs, direction, change, shift) / (size * length)
    if _agree(slope, expected):
        return
    closer = dot([c for c in change if c is not None], [c for c in nearer() if c is not None]) / (size * length)
    closer_slope = _slope(stage, solution, inputs, direction, change, NEARER * shift) / (size * length)
    if not (_agree(closer, expected) and _agree(closer_slope, slope)):
        return
    warnings.warn(
        f"stage {stage.name!r}: the derivatives of {stage.title} in θ and x depend on their order ({expected:.2g} and "
        f"{slope:.2g} along one direction), as with a stop-gradient inside (detach(), .data, torch.no_grad()), or with "
        "many kinks at the very weights (max pooling over equal values, ReLU at 0). Directional derivatives of "
        "gradients, and FiniteDifference with them, are then wrong. Use a method with "
        "product=mlo.DoubleBackward(), e.g. mlo.Identity(scale=None) in the place of mlo.FiniteDifference().",
        MloWarning,
        stacklevel=2,
    )


def _slope(
    stage: StageFunction,
    solution: Vector,
    inputs: Vector,
    direction: Sequence[Tensor],
    change: Sequence[Tensor | None],
    shift: float,
) -> float:
    """Return the derivative of `direction`·∂L/∂θ along `change` in x, by a central difference."""
    ahead, behind = (
        loss_gradients(
            stage,
            leaves(solution),
            tuple(t.detach() if c is None else t.detach() + s * c for t, c in zip(inputs, change, strict=True)),
            seldom=True,
        ).theta
        for s in (shift, -shift)
    )
    pairs = zip(direction, ahead, behind, strict=True)
    return sum(dot([d], [a - b]) for d, a, b in pairs if a is not None and b is not None) / (2 * shift)


def _agree(a: float, b: float) -> bool:
    return abs(a - b) <= _SYMMETRIC * max(abs(a), abs(b))
