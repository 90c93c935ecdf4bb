"""The inverse Hessian replaced by a multiple of the identity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.implicit import ImplicitMethod, Solution, gradient_norm, is_read, normalising_factor
from mlo.hypergradient.scaling import Scale, factors_as_tensors, is_scale, scale_factors
from mlo.linear_system import LinearSystem
from mlo.recurrence import Ending, Recurrence, TracedProduct
from mlo.stage_function import StageFunction
from mlo.status import SolveReport, Status
from mlo.traced import inner, times
from mlo.vectors import Vector, norm, scale, scaled

# Below this a vector's length is in the range of every dtype.
_IN_RANGE = 1e4


@dataclass(frozen=True)
class Identity(ImplicitMethod):
    """H⁻¹ ≈ `scale`·I, so that c ↦ −scale·Gᵀ c (T1–T2).

    With the inner learning rate η as the scale it is the derivative of the last gradient step (one-step
    unrolling): θ⁺ = θ − η·∂L/∂θ, ∂θ⁺/∂x = −η·G. It is the first term of the Neumann series, and exact
    where H = I / scale.

    Args:
        scale: the multiple, or `None` for the learning rate of each parameter group of the stage.
        on_breakdown: see `HypergradientMethod`. Breaks down on non-finite cotangents only.

    Raises:
        ConfigurationError: scale is not positive.

    Cost: no Hessian–vector product, one mixed product (one forward and two reverse passes). Memory: the graph of the
    gradient and one vector of the stage's size.

    Source: Luketina et al., "Scalable gradient-based tuning of continuous regularization
    hyperparameters", ICML 2016.

    >>> import mlo, torch
    >>> def loss(w, x):                                   # w*(x) = x / 2 and H = 2
    ...     return w**2 - w * x
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> w = mlo.best_response(loss, torch.tensor(1.5), x, mlo.Identity(scale=0.5))
    >>> torch.autograd.grad(w, x)[0].item()               # exact, since scale = 1 / H
    0.5

    """

    scale: Scale = 1.0

    hands_over: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not is_scale(self.scale):
            raise self.option_error("scale", "a positive number, or None for the stage's learning rate")

    @property
    def needs_learning_rate(self) -> bool:
        """Whether the scale is the stage's learning rate."""
        return self.scale is None

    def solve(self, system: LinearSystem) -> Solution:
        """Return scale·c."""
        adjoint, status = self._scaled(system.rhs, system.rhs_norm, scale_factors(self, self.scale, system))
        return Solution(adjoint, status, iterations=0, relative_residual=None)

    def pullback(
        self,
        stage: StageFunction,
        cotangents: Sequence[Tensor],
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return −scale·Gᵀ c; λ is known before g, so that g and the product can be formed together."""
        kind = type(self)
        own_rule = kind.solve is not Identity.solve or kind.solve_and_settle is not ImplicitMethod.solve_and_settle
        if torch.is_grad_enabled() or own_rule:
            return super().pullback(stage, cotangents, solution, inputs, needed)
        size, factors = norm(cotangents), scale_factors(self, self.scale, stage)
        factor = normalising_factor(size)
        rhs = cotangents if factor == 1.0 else scale(cotangents, factor)
        adjoint, status = self._scaled(rhs, size * factor, factors)
        read = is_read(stage, status)
        gradient, mixed = self.product.only_mixed_product(stage, solution, inputs, needed, adjoint, gradient_too=read)
        distance = gradient_norm(gradient) if read and gradient is not None else None
        self.settle(stage, SolveReport(stage.name, type(self).__name__, status, 0, None, 0, distance))
        return scaled(mixed, -1 / factor)

    def recurrence(self) -> Recurrence | None:
        """Return the multiplication."""
        return _Multiple(self) if type(self) is Identity else None

    @staticmethod
    def _scaled(rhs: Sequence[Tensor], size: float, factors: float | tuple[float, ...]) -> tuple[Vector, Status]:
        """Return λ = scale·c and whether it is finite, for c of length `size`."""
        adjoint = scale(rhs, factors)
        largest = max(factors) if isinstance(factors, tuple) else factors
        # An upper bound of ‖λ‖, known without looking at its entries.
        finite = size * largest < _IN_RANGE or math.isfinite(norm(adjoint))
        return adjoint, Status.APPROXIMATE if finite else Status.NON_FINITE


class _Multiple(Recurrence):
    """What `Identity.solve` does, with ‖λ‖²."""

    steps, count = 0, 1

    def __init__(self, method: Identity) -> None:
        self._method = method

    @staticmethod
    def run(
        product: TracedProduct, rhs: Sequence[Tensor], steps: int, factors: Vector
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        adjoint = list(map(times, factors, rhs))
        return adjoint, [[inner(adjoint, adjoint)]]

    def factors(self, stage: StageFunction, theta: Sequence[Tensor]) -> Vector:
        return factors_as_tensors(self._method, self._method.scale, stage, theta)

    def ending(self, numbers: Sequence[float], theta: Sequence[Tensor], size: float) -> Ending | None:
        (squared,) = numbers
        return Ending(Status.APPROXIMATE, 0, None, 0) if math.isfinite(squared) else None
