"""The mixed product by central differences of gradients: no second derivative at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.base import HypergradientMethod
from mlo.hypergradient.first_order import first_order_only
from mlo.hypergradient.scaling import Scale, factors_as_tensors, is_scale, scale_factors
from mlo.options import is_number
from mlo.products.central_differences import central_difference, very_different
from mlo.products.directional import NEARER, relative_shift_length, shift_length, warn_of_asymmetry
from mlo.recurrence import Ending
from mlo.stage_function import StageFunction, leaves
from mlo.status import SolveReport, Status
from mlo.traced import length, slopes, times, wide, write
from mlo.traced_pullback import TracedPullback, TracedResult
from mlo.vectors import SMALLEST_LENGTH, Vector, norm, scale

# How many parameters a stage may have, and of how many entries, whose two sides are compiled as one function: it takes
# twice as long to compile and a few copies of them, and saves a call or two of some 0.05 ms.
_FEW_TENSORS, _FEW_ENTRIES = 16, 2**14


@dataclass(frozen=True)
class FiniteDifference(HypergradientMethod):
    """c ↦ −[∂L/∂x(θ + εd, x) − ∂L/∂x(θ − εd, x)] / 2ε with d = `scale`·c.

    The inverse Hessian is replaced by `scale`·I as in `Identity`, exact where H = I / scale, and the mixed product Gᵀ d
    is a central difference at the solved weights: exact for a quadratic loss, and with an error of order ε² else. Both
    sides see the same batch and the same random draws. The user's parameters are never written to; works for modules
    that have no second derivative.

    Wrong where the loss holds a stop-gradient (`detach()`, `.data`, `torch.no_grad()`) between θ and x, as that of
    Meta-Weight-Net commonly does: the difference goes through it. The engine checks this once and warns; use
    `Identity(scale=None)` there.

    Not the same as the second-order formula of the DARTS paper, whose differences are taken at the weights
    before the step.

    Args:
        scale: the multiple, or `None` for the learning rate of each parameter group of the stage.
        epsilon: length of the shift ‖εd‖, in the units of the parameters. `None`: max(∛u/32, 32u)·max(1, ‖θ‖),
            with u the rounding unit of the parameters' dtype: the cube root balances the error of the difference (∝ ε²)
            with that of rounding (∝ u/ε), and 1/32 is what small networks were measured to want; 32u keeps the
            shift of a 16-bit weight above its own rounding.
        on_breakdown: see `HypergradientMethod`. Breaks down on non-finite cotangents only.

    Raises:
        ConfigurationError: an option is out of range; or the stage's own loss contains a response that depends
            on the stage (which would have to be shifted too), or a stage above needs this method's derivative:
            then use `ConjugateGradient`, `Neumann` or `Identity`.

    Cost: no Hessian–vector product; two forward and two reverse passes, no second-order graph. The shifted parameters
    take the memory of the cotangents where nothing else can refer to it (in an engine, unless a method of one's own
    keeps them); else there is one copy of the stage's parameters at a time. Whether the loss asks which parameters need
    a gradient is found out at the second solve, by two more evaluations with their gradients; until then, and where it
    does, the graph in θ is made too. It reports no gradient norm of the stage: its two gradients are in x alone.

    Source: Liu, Simonyan and Yang, "DARTS: differentiable architecture search", ICLR 2019, section 2.3.

    >>> import mlo, torch
    >>> def loss(w, x):
    ...     return w**2 - w * x
    >>> x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    >>> w = mlo.best_response(loss, x.detach() / 2, x, mlo.FiniteDifference(scale=0.5))
    >>> round(torch.autograd.grad(w, x)[0].item(), 6)     # w* = x / 2 and scale = 1 / H
    0.5

    """

    scale: Scale = None
    epsilon: float | None = None

    differentiable: ClassVar[bool] = False
    allows_internal_responses: ClassVar[bool] = False
    hands_over: ClassVar[bool] = True
    uses_up_cotangents: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not is_scale(self.scale):
            raise self.option_error("scale", "a positive number, or None for the stage's learning rate")
        if self.epsilon is not None and (not is_number(self.epsilon) or self.epsilon <= 0):
            raise self.option_error("epsilon", "a positive number, or None for a choice by dtype")

    @property
    def needs_learning_rate(self) -> bool:
        """Whether the scale is the stage's learning rate."""
        return self.scale is None

    def pullback(
        self,
        stage: StageFunction,
        cotangents: Sequence[Tensor],
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return the central difference."""
        if not torch.is_grad_enabled():
            return self._central_difference(stage, cotangents, solution, inputs, needed)
        with torch.no_grad():
            result = self._central_difference(stage, cotangents, solution, inputs, needed)
        return first_order_only(self, stage, result, (*cotangents, *solution, *inputs))

    def traced_pullback(self) -> TracedPullback | None:
        """Return the difference."""
        return _TracedDifference(self) if type(self) is FiniteDifference else None

    def _central_difference(
        self,
        stage: StageFunction,
        cotangents: Sequence[Tensor],
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        factors = scale_factors(self, self.scale, stage)
        direction, size = self._direction(cotangents, factors, stage.signs)
        length = norm(direction)
        status = Status.APPROXIMATE if math.isfinite(length) else Status.NON_FINITE
        self.settle(stage, SolveReport(stage.name, type(self).__name__, status, 0, None, 0))
        if length == 0:
            return tuple(torch.zeros_like(x) if n else None for x, n in zip(inputs, needed, strict=True))
        if not status.ok:
            return tuple(torch.full_like(x, math.nan) if n else None for x, n in zip(inputs, needed, strict=True))
        shift = self.epsilon or shift_length(solution)
        x = leaves(inputs, needed)

        check = stage.symmetry_check_due() and size != 0

        def difference(way: float, factor: float) -> tuple[Tensor | None, ...]:
            scaled, disposable = factor * length / (2 * way), stage.disposable_cotangents and not check
            return central_difference(
                stage, solution, direction, way / length, x, scaled, in_theta=False, disposable=disposable
            )

        result = difference(shift, -size)
        if check:
            change = tuple(None if r is None else r / -size for r in result)
            warn_of_asymmetry(
                stage, tuple(solution), tuple(inputs), direction, change, lambda: difference(NEARER * shift, 1.0)
            )
        return result

    @staticmethod
    def _direction(
        cotangents: Sequence[Tensor], factors: float | tuple[float, ...], signs: tuple[float, ...]
    ) -> tuple[Sequence[Tensor], float]:
        """Return vectors and a number whose product is d; where all factors are equal, no vector is made."""
        each = factors if isinstance(factors, tuple) else (factors,) * len(signs)
        signed = list(map(mul, each, signs))
        if signed.count(signed[0]) == len(signed):
            return cotangents, signed[0]
        return scale(cotangents, signed), 1.0


class _TracedDifference(TracedPullback):
    """What `FiniteDifference.pullback` does, with ‖d‖."""

    evaluations, steps, count = 2, 0, 1
    moves = True

    def __init__(self, method: FiniteDifference) -> None:
        self._method = method

    @staticmethod
    def run(
        evaluate: Callable[[], Tensor], theta: Vector, x: Vector, cotangents: Sequence[Tensor], *arguments: Any
    ) -> TracedResult:
        factors, (shift,), in_units_of_theta = arguments
        direction = [f * c.to(f.dtype) for f, c in zip(factors, cotangents, strict=True)]
        size = length(direction)
        centre = [t.detach().clone() for t in theta]
        way = shift * length(centre).clamp(min=1.0) if in_units_of_theta else shift
        rate = way / size
        ahead = [(c.to(d.dtype) + rate.to(d.dtype) * d).to(c.dtype) for c, d in zip(centre, direction, strict=True)]
        behind = [c + (c - t) for c, t in zip(centre, ahead, strict=True)]
        gradients = []
        for side in (ahead, behind):
            write(theta, side)
            gradients.append(slopes((evaluate(),), x))
        write(theta, centre)  # which a loss above may have kept, or want to log
        return TracedResult(tuple([_slope(rate, a, b) for a, b in zip(*gradients, strict=True)]), [size])

    def allows(self, stage: StageFunction, theta: Sequence[Tensor]) -> bool:
        """Whether the stage is small, and what is looked at in its first differences has been."""
        return (
            stage.differences_checked
            and len(theta) <= _FEW_TENSORS
            and sum(map(Tensor.numel, theta)) <= _FEW_ENTRIES
            # Torch loses what is written to a number in double precision (2.13).
            and all(map(Tensor.dim, theta))
        )

    def arguments(self, stage: StageFunction, theta: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the factors of d, the length of the shift, and whether it is relative to ‖θ‖."""
        factors = factors_as_tensors(self._method, self._method.scale, stage, theta)
        signed = tuple([sign * f for sign, f in zip(stage.signs, factors, strict=True)])
        epsilon = self._method.epsilon
        shift = relative_shift_length(theta) if epsilon is None else epsilon
        return signed, (theta[0].new_tensor(shift, dtype=torch.float64),), epsilon is None

    def ending(
        self, stage: StageFunction, theta: Sequence[Tensor], losses: Sequence[float], numbers: Sequence[float]
    ) -> tuple[Ending, float | None] | None:
        """Return that there is a direction, if both sides may well be one function."""
        (size,), (there, back) = numbers, losses
        if not SMALLEST_LENGTH < size < math.inf:
            return None
        if very_different(there, back) and stage.repetition_check_next():
            return None
        return Ending(Status.APPROXIMATE, 0, None, 0), None


def _slope(rate: Tensor, ahead: Tensor | None, behind: Tensor | None) -> Tensor | None:
    """Return −(ahead − behind) / 2·rate, where one that is missing counts as zero."""
    there = ahead if ahead is not None else behind
    if there is None:
        return None
    zero = torch.zeros_like(there)
    change = (zero if behind is None else behind) - (zero if ahead is None else ahead)
    return times((0.5 / rate).to(wide(there.dtype)), change)
