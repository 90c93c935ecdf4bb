"""What re-solves a stage to rounding: the reference that a method is compared with.

Solvers share nothing with the hypergradient methods and need first derivatives of a stage's loss only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.errors import ConfigurationError, LossError
from mlo.options import is_count, is_number
from mlo.testing.errors import NotSolvedError

# Length of the shift for a column of the Jacobian: the cube root of the rounding unit of float64.
_SHIFT = 6e-6
#: Smaller shares of the largest singular value count as zero.
SINGULAR = 1e-13


@dataclass(frozen=True)
class Equation:
    """g(θ) = 0 for one stage, at given values of everything that it depends on.

    Attributes:
        name: the stage.
        residual: θ ↦ g(θ), the gradient of the stage's (reduced) loss as its optimizer sees it.
        objective: θ ↦ the number whose gradient g is, or `None` where there is none.
        takes_part: which entries of θ the loss reaches; the others stay what they are.

    """

    name: str
    residual: Callable[[Tensor], Tensor]
    objective: Callable[[Tensor], float] | None
    takes_part: Tensor

    def jacobian(self, theta: Tensor) -> Tensor:
        """Return ∂g/∂θ over the entries that take part, by central differences.

        Cost: two evaluations of g per entry.
        """
        columns = []
        for i in self.takes_part.nonzero().squeeze(1).tolist():
            h = _SHIFT * max(1.0, abs(theta[i].item()))
            ahead, behind = theta.clone(), theta.clone()
            ahead[i] += h
            behind[i] -= h
            difference = self.residual(ahead) - self.residual(behind)
            columns.append(difference[self.takes_part] / (ahead[i] - behind[i]))
        return torch.stack(columns, dim=1)

    def inverse(self, theta: Tensor) -> Tensor:
        """Return (∂g/∂θ)⁻¹, with zeros for the entries that take no part."""
        jacobian = self.jacobian(theta)
        singular = torch.linalg.svdvals(jacobian)
        if not torch.isfinite(jacobian).all() or singular[-1] <= SINGULAR * singular[0]:
            raise NotSolvedError(
                f"stage {self.name!r} could not be re-solved: the Jacobian of its gradient has singular values from "
                f"{singular[-1].item():.1e} to {singular[0].item():.1e}, so its solution is not unique; expected an "
                "isolated solution. Regularise its loss (weight decay, a proximal term)."
            )
        full = torch.zeros(len(theta), len(theta), dtype=theta.dtype, device=theta.device)
        full[torch.outer(self.takes_part, self.takes_part)] = torch.linalg.inv(jacobian).reshape(-1)
        return full

    def at(self, theta: Tensor) -> tuple[Tensor, float]:
        """Return g and its norm, which is infinite where the loss is not a finite number."""
        try:
            g = self.residual(theta)
        except LossError:
            return torch.full_like(theta, math.nan), math.inf
        size = torch.linalg.vector_norm(g).item()
        return g, size if math.isfinite(size) else math.inf

    def failure(self, why: str, remedy: str) -> NotSolvedError:
        """Return the error for a stage that is not solved."""
        return NotSolvedError(f"stage {self.name!r} could not be re-solved: {why}. {remedy}")


class Solver(ABC):
    """Finds the solution of a stage."""

    #: Whether the derivative of a solution may be formed from the stage's dense Jacobian.
    forms_jacobian: bool

    @abstractmethod
    def solve(self, equation: Equation, start: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return θ with g(θ) = 0 and a usable inverse Jacobian, if there is one.

        Args:
            equation: the stage's stationarity.
            start: where to begin.
            inverse: an inverse Jacobian from a solve close by, or `None`.

        Raises:
            NotSolvedError: the solve does not converge.
            ConfigurationError: the stage is not one for this solver.

        """


def check_count(solver: str, option: str, value: object) -> None:
    """Raise an error for an option that must be a positive integer."""
    if not is_count(value):
        raise ConfigurationError(f"{solver}({option}={value!r}): expected an integer of at least 1.")


def check_positive(solver: str, option: str, value: object) -> None:
    """Raise an error for an option that must be a positive number."""
    if not is_number(value) or value <= 0:  # type: ignore[operator]
        raise ConfigurationError(f"{solver}({option}={value!r}): expected a positive number.")
