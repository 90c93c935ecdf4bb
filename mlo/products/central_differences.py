"""Products by central differences of gradients: no second derivative at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.errors import ConfigurationError, EvaluationError
from mlo.memory import alone
from mlo.options import is_number
from mlo.products.base import Linearisation, Product
from mlo.products.directional import NEARER, DirectionalLinearisation, loss_gradients, shift_length
from mlo.stage_function import StageFunction, leaves
from mlo.vectors import Vector, add, differences, norm, reflect_, rounding_unit, scale_and_add_

# The two sides are looked at more closely where they differ by this share of the loss: a shift changes it by less.
_SUSPICIOUS = 0.01
# Two gradients at one point count as one that differ by so many rounding units.
_ROUNDINGS = 4


@dataclass(frozen=True)
class CentralDifferences(Product):
    """Hᵀv ≈ [∂L/∂θ(θ + εv) − ∂L/∂θ(θ − εv)] / 2ε, and likewise Gᵀv with ∂L/∂x.

    Exact for a quadratic loss, and of order ε² else; relative errors of about u^⅔ are what is left of rounding, with u
    the rounding unit of the dtype: 4e-11 in float64, 2e-5 in float32. A solver can not be more accurate than its
    products: an `rtol` below that is never reached.

    Args:
        epsilon: length of the shift ‖εv‖, in the units of the parameters. `None`: max(∛u/32, 32u)·max(1, ‖θ‖): the
            cube root balances the error of the difference (∝ ε²) with that of rounding (∝ u/ε), and 1/32 is what
            small networks were measured to want; 32u keeps the shift of a 16-bit weight above its own rounding.

    Raises:
        ConfigurationError: epsilon is not positive.

    Cost: one forward and one reverse pass to set up, two of each per product. The memory of one training step and one
    shifted copy of the parameters. Both sides see the same batch and the same random draws, and the user's parameters
    are never written to.

    Needs first derivatives only; has no derivative of its own.

    Source: Andrei, "Accelerated conjugate gradient algorithm with finite difference Hessian/vector product
    approximation", 2009; Liu, Simonyan and Yang, "DARTS", ICLR 2019, section 2.3, for the mixed product.

    >>> import mlo, torch
    >>> def loss(w, x):                                   # w*(x) = x / 2; at x = 1, H = 5 and G = −5 / 2
    ...     return w**2 + w**4 - w * (x + 0.5 * x**3)
    >>> x = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> for epsilon in (0.1, 0.05):                       # the fourth derivative makes an error of 4 ε² in H
    ...     method = mlo.Dense(product=mlo.CentralDifferences(epsilon=epsilon))
    ...     w = mlo.best_response(loss, x.detach() / 2, x, method)
    ...     print(round(2.5 / torch.autograd.grad(w, x)[0].item() - 5, 6))
    0.04
    0.01

    """

    epsilon: float | None = None

    def __post_init__(self) -> None:
        """Check the option."""
        if self.epsilon is not None and (not is_number(self.epsilon) or self.epsilon <= 0):
            raise ConfigurationError(
                f"CentralDifferences(epsilon={self.epsilon!r}): expected a positive number, or None for a choice by "
                "dtype."
            )

    @contextmanager
    def linearised(
        self,
        stage: StageFunction,
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        known: Sequence[Tensor | None] | None = None,
    ) -> Iterator[Linearisation]:
        """Evaluate the gradient once if it is not known, to find what takes part."""
        yield _Differences(stage, solution, inputs, needed, known, self.epsilon)


class _Differences(DirectionalLinearisation):
    def __init__(
        self,
        stage: StageFunction,
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        known: Sequence[Tensor | None] | None,
        epsilon: float | None,
    ) -> None:
        super().__init__(stage, solution, inputs, needed, known)
        self._shift = shift_length(solution) if epsilon is None else epsilon

    def derivative(self, direction: Vector, *, in_theta: bool) -> tuple[Tensor | None, ...]:
        return self._over(direction, self._shift, in_theta=in_theta)

    def derivative_nearer(self, direction: Vector) -> tuple[Tensor | None, ...]:
        return self._over(direction, NEARER * self._shift, in_theta=False)

    def _over(self, direction: Vector, shift: float, *, in_theta: bool) -> tuple[Tensor | None, ...]:
        x = leaves(self.inputs, False if in_theta else self.needed)
        length = norm(direction)
        if length == 0:
            return direction if in_theta else tuple([torch.zeros_like(t) if t.requires_grad else None for t in x])
        factor = length / (2 * shift)
        return central_difference(self.stage, self.solution, direction, shift / length, x, factor, in_theta=in_theta)


def central_difference(
    stage: StageFunction,
    solution: Sequence[Tensor],
    direction: Sequence[Tensor],
    shift: float,
    x: Vector,
    factor: float,
    *,
    in_theta: bool,
    disposable: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return [∇L(θ + shift·direction, x) − ∇L(θ − shift·direction, x)]·factor, the gradients those in θ or in x.

    The shifted θ take the memory of a direction that is `disposable`.

    Raises:
        EvaluationError: the loss is another function on each side.

    """
    if disposable and _fits(direction, solution):
        shifted = scale_and_add_(tuple(direction), shift, solution)
    else:
        shifted = add(solution, direction, shift)
    if not in_theta and stage.flags_check_due():
        stage.asks_for_gradients = _asks_for_gradients(stage, shifted, x)
    # Without need the graph in θ is not made.
    theta = leaves(shifted) if in_theta or stage.asks_for_gradients else shifted
    at = theta if in_theta else x
    with torch.enable_grad(), stage.evaluation(theta, x) as evaluate:
        there, ahead = evaluate.value_and_gradients(at)
        # Past the count of writes, since it is not the loss that writes; its graph of the first side is gone.
        reflect_(shifted, solution)
        back, behind = evaluate.value_and_gradients(at)
    if very_different(there, back) and stage.repetition_check_due():
        _check_repeatable(stage, back, theta, x)
    return differences(ahead, behind, factor)


def very_different(there: float, back: float) -> bool:
    """Whether the losses of both sides differ by more than a shift changes them."""
    return abs(there - back) > _SUSPICIOUS * max(abs(there), abs(back))


def _asks_for_gradients(stage: StageFunction, theta: Vector, x: Vector) -> bool:
    """Whether ∂L/∂x is another one where θ needs a gradient: `sum(… for p in parameters if p.requires_grad)`."""
    needing = loss_gradients(stage, leaves(theta), x, seldom=True).x
    try:
        others = loss_gradients(stage, theta, x, seldom=True).x
    except RuntimeError:  # it takes a gradient in θ itself, or looks for a graph
        return True
    for a, b in zip(needing, others, strict=True):
        if (a is None) is not (b is None):
            return True
        # What is taken for another one by mistake costs the graph in θ, and no more.
        if a is not None and b is not None and not norm([a - b]) <= _ROUNDINGS * rounding_unit([a]) * norm([a]):
            return True
    return False


def _fits(direction: Sequence[Tensor], solution: Sequence[Tensor]) -> bool:
    """Whether the shifted θ can be written over a direction: laid out in the same way, in memory of its own."""
    return all(alone(d) and d.stride() == t.stride() for d, t in zip(direction, solution, strict=True))


def _check_repeatable(stage: StageFunction, there: float, at: Vector, x: Vector) -> None:
    """Raise an error if the loss has another value in a second evaluation at the same point."""
    with torch.no_grad(), stage.evaluation(at, leaves(x, False)) as evaluate:
        again = evaluate()
    # Kernels that add up in no fixed order differ by rounding; another random draw differs by much more.
    back = again.item()
    if abs(there - back) > math.sqrt(torch.finfo(again.dtype).eps) * max(abs(there), abs(back)):
        stage.repetition_failed()
        raise EvaluationError(
            f"stage {stage.name!r}: {stage.title} is {there} and then {back} for the same parameters, "
            "batch and random state; expected one function for both sides of a central difference. Draw from the "
            "global generators of torch, NumPy or Python, which are replayed, and not from one of your own; or use a "
            "method with one evaluation per solve, such as Identity or Neumann by double backward."
        )
