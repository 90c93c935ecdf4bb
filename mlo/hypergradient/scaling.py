"""The scale of the methods that take the stage's learning rate for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mlo.errors import ConfigurationError
from mlo.hypergradient.base import HypergradientMethod
from mlo.linear_system import LinearSystem
from mlo.options import is_number
from mlo.stage_function import StageFunction
from mlo.traced import numbers_as_tensors
from mlo.vectors import Vector

Scale = float | None


def is_scale(value: object) -> bool:
    """Whether `value` is a positive number, or `None` for the learning rate."""
    return value is None or (is_number(value) and value > 0)  # type: ignore[operator]


def scale_factors(
    method: HypergradientMethod, scale: Scale, system: LinearSystem | StageFunction
) -> float | tuple[float, ...]:
    """Return `scale`, or where it is `None` the learning rate of each tensor."""
    if scale is not None:
        return scale
    rates = system.learning_rates
    if rates is None:
        raise missing_learning_rate(method, system.name)
    return rates


def factors_as_tensors(
    method: HypergradientMethod, scale: Scale, stage: StageFunction, theta: Sequence[Tensor]
) -> Vector:
    """Return the factor of each tensor as a tensor, for what torch.compile traces."""
    found = scale_factors(method, scale, stage)
    return numbers_as_tensors(found if isinstance(found, tuple) else (found,) * len(theta), theta)


def missing_learning_rate(method: HypergradientMethod, stage: str) -> ConfigurationError:
    """Return the error for a method that needs the learning rate of a stage that has none."""
    name = type(method).__name__
    return ConfigurationError(
        f"{name} at stage {stage!r} takes the stage's learning rate for its scale, but the stage has no optimizer. "
        f"Give the stage an optimizer, or the scale itself: {name}(scale=0.1)."
    )
