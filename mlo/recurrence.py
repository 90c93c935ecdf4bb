"""A solver as arithmetic of a known length, which compiled code can do without a look at a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from mlo.stage_function import StageFunction
from mlo.status import Status
from mlo.vectors import Vector

#: Hᵀ·vector for a vector of one tensor for each parameter.
TracedProduct = Callable[[Sequence[Tensor]], list[Tensor]]


class Ending(NamedTuple):
    """How a solve ended, in the words and the order of `SolveReport`."""

    status: Status
    iterations: int
    relative_residual: float | None
    products: int


class Recurrence(ABC):
    """How a solve of Hᵀλ = c goes if nothing ends it early.

    Attributes:
        steps: how many steps it makes.
        count: how many numbers they give.

    """

    steps: int
    count: int

    @staticmethod
    @abstractmethod
    def run(
        product: TracedProduct, rhs: Sequence[Tensor], steps: int, factors: Vector
    ) -> tuple[Sequence[Tensor], list[list[Tensor]]]:
        """Return λ and one row of numbers for each step, in terms that torch.compile can trace."""

    @abstractmethod
    def factors(self, stage: StageFunction, theta: Sequence[Tensor]) -> Vector:
        """Return the method's own numbers as tensors (see `traced.numbers_as_tensors`)."""

    @abstractmethod
    def ending(self, numbers: Sequence[float], theta: Sequence[Tensor], size: float) -> Ending | None:
        """Return how the solve ended, from all rows and ‖c‖ = `size`; `None` if `solve` would have ended it early."""
