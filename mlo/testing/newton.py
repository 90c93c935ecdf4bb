"""Newton's method with the explicit Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.errors import ConfigurationError, LossError
from mlo.testing.solver import SINGULAR, Equation, Solver, check_count, check_positive

# Below this ratio of ‖g‖ after and before a step the Jacobian is as good as new.
_FAST = 0.1
# A step that leaves more than this of ‖g‖ is not taken unless with a new Jacobian.
_SLOW = 0.5
# A step below this share of ‖θ‖ is the last one, whatever the age of the Jacobian.
_ROUNDING = 1e-13
# A stage is at a stationary point if Newton's step is below this share of ‖θ‖: one that may be a saddle on purpose.
_SOLVED = 1e-3
# Halvings of a step before the search for a smaller ‖g‖ ends.
_HALVINGS = 30


@dataclass(frozen=True)
class Newton(Solver):
    """Newton's method on g(θ) = 0 with the explicit Jacobian; finds minima, saddles and equilibria alike.

    θ ← θ − t·J⁻¹ g, with t halved until ‖g‖ shrinks. J is formed by central differences of g, and kept, with Broyden's
    updates, as long as ‖g‖ shrinks tenfold per step with it. Ends at the rounding of g.

    Where the stage minimises a loss and is not at a stationary point yet, steps with the absolute eigenvalues of J
    first lead downhill until J is positive definite, so that a minimum is found if there is one. Otherwise the solution
    is the one that the steps from the engine's present parameters lead to.

    Args:
        max_size: refuse stages of more parameters than this.
        tolerance: a solve has converged if its last step is below tolerance·max(1, ‖θ‖) when ‖g‖ shrinks no
            further.
        max_steps: upper limit of steps.

    Cost: two gradients per parameter for each J, one per step, O(n³) operations and an n × n matrix.

    Source: Nocedal and Wright, "Numerical Optimization", chapter 11; Dauphin et al., "Identifying and attacking the
    saddle point problem", NeurIPS 2014.

    """

    max_size: int = 2000
    tolerance: float = 1e-8
    max_steps: int = 100

    forms_jacobian = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_count("Newton", "max_size", self.max_size)
        check_positive("Newton", "tolerance", self.tolerance)
        check_count("Newton", "max_steps", self.max_steps)

    def solve(self, equation: Equation, start: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return θ and the last inverse Jacobian."""
        self._check_size(equation)
        theta = start if inverse is not None else self._descended(equation, start)
        g, size = equation.at(theta)
        if not math.isfinite(size):
            raise equation.failure("its gradient is not finite where the solve begins", "Look at its loss there.")
        if size == 0:
            return theta, inverse
        fresh, matrix = inverse is None, equation.inverse(theta) if inverse is None else inverse
        for _ in range(self.max_steps):
            step = -matrix @ g
            length = _relative_length(step, theta)
            if length <= _ROUNDING:
                return theta + step, matrix
            after = equation.at(theta + step)
            if after[1] <= _SLOW * size:
                fresh = after[1] > _FAST * size
                matrix = matrix if fresh else _updated(matrix, step, after[0] - g)
                theta, (g, size) = theta + step, after
                if size == 0:
                    return theta, matrix
            elif fresh and length <= self.tolerance:
                return (theta + step, matrix) if after[1] < size else (theta, matrix)
            elif fresh:
                theta, g, size = self._shortened(equation, theta, step, size)
            else:
                fresh = True
            if fresh:
                matrix = equation.inverse(theta)
        raise equation.failure(
            f"after {self.max_steps} Newton steps its gradient has the norm {size:.1e}",
            "Train it further before the check, or solve it by mlo.testing.LBFGS().",
        )

    def _descended(self, equation: Equation, start: Tensor) -> Tensor:
        """Return a point from which Newton's steps lead to a minimum, or `start` if there is no way down to one."""
        objective, part = equation.objective, equation.takes_part
        if objective is None:
            return start
        theta = start
        for _ in range(self.max_steps):
            g, size = equation.at(theta)
            if not math.isfinite(size):
                return start
            jacobian = equation.jacobian(theta)
            symmetric = torch.linalg.matrix_norm(jacobian - jacobian.T) <= 1e-6 * torch.linalg.matrix_norm(jacobian)
            if not symmetric or not torch.isfinite(jacobian).all():
                return start
            values, vectors = torch.linalg.eigh(0.5 * (jacobian + jacobian.T))
            bent = values.abs().clamp(min=SINGULAR * max(1.0, values.abs().max().item()))
            step = torch.zeros_like(theta)
            step[part] = -vectors @ ((vectors.T @ g[part]) / bent)
            if values[0] > 0 or (theta is start and _relative_length(step, theta) <= _SOLVED):
                return theta
            moved = _downhill(objective, theta, step, torch.dot(g, step).item())
            if moved is None:
                return start
            theta = moved
        return start

    def _check_size(self, equation: Equation) -> None:
        size = int(equation.takes_part.sum().item())
        if size > self.max_size:
            raise ConfigurationError(
                f"Newton at stage {equation.name!r}: {size} parameters make a Jacobian of {size}² entries; expected at "
                f"most max_size={self.max_size}. Pass solve=mlo.testing.LBFGS() for this stage, or raise max_size."
            )

    @staticmethod
    def _shortened(equation: Equation, theta: Tensor, step: Tensor, size: float) -> tuple[Tensor, Tensor, float]:
        t = 1.0
        for _ in range(_HALVINGS):
            g, after = equation.at(theta + t * step)
            if after < (1 - 1e-4 * t) * size:
                return theta + t * step, g, after
            t /= 2
        raise equation.failure(
            f"no Newton step makes its gradient shorter than {size:.1e}",
            "Train it further before the check, or solve it by mlo.testing.LBFGS(). A loss with kinks or with random "
            "draws that are not replayed has no such point.",
        )


def _relative_length(step: Tensor, theta: Tensor) -> float:
    return float(torch.linalg.vector_norm(step)) / max(1.0, float(torch.linalg.vector_norm(theta)))


def _downhill(objective: Callable[[Tensor], float], theta: Tensor, step: Tensor, slope: float) -> Tensor | None:
    """Return the first of θ + step, θ + step/2, … at which the objective is sufficiently smaller, if there is one."""
    value, t = objective(theta), 1.0
    for _ in range(_HALVINGS):
        try:
            change = objective(theta + t * step) - value
        except LossError:
            change = math.inf
        if change <= 1e-4 * t * slope:
            return theta + t * step
        t /= 2
    return None


def _updated(inverse: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """Return Broyden's update of an inverse Jacobian, after which it maps the change of g to the step."""
    predicted = inverse @ change
    weights = step @ inverse
    curvature = weights @ change
    if not abs(curvature.item()) > 0.1 * (step @ step).item():
        return inverse
    return inverse + torch.outer(step - predicted, weights) / curvature
