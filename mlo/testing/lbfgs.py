"""Limited-memory BFGS, for stages too large for their Jacobian."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.errors import ConfigurationError
from mlo.testing.solver import Equation, Solver, check_count, check_positive

# Changes of a loss below this share of it are rounding.
_FLAT = 1e-14
# Halvings of a step before a line search ends.
_HALVINGS = 30


@dataclass(frozen=True)
class LBFGS(Solver):
    """Minimise the stage's loss by limited-memory BFGS until ‖g‖ ≤ `tolerance`: for stages too large for `Newton`.

    The line search halves the step until the loss has decreased or, where the loss is too flat to tell, the slope along
    the step has (the approximate Wolfe condition of Hager and Zhang). A stage that is nested in another one has to be
    differentiated, which this solver does not do.

    Args:
        tolerance: the gradient norm to reach, in the units of loss per parameter. The error of the re-solved
            parameters is up to tolerance / (smallest eigenvalue of the Hessian).
        max_steps: upper limit of steps.
        history: how many pairs of differences are kept.

    Cost: about one loss and one gradient per step; 2·history vectors.

    Source: Nocedal and Wright, "Numerical Optimization", algorithm 7.4; Hager and Zhang, SIAM J. Optim. 16, 2005.

    """

    tolerance: float = 1e-11
    max_steps: int = 5000
    history: int = 30

    forms_jacobian = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_positive("LBFGS", "tolerance", self.tolerance)
        check_count("LBFGS", "max_steps", self.max_steps)
        check_count("LBFGS", "history", self.history)

    def solve(self, equation: Equation, start: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return θ, and no Jacobian."""
        objective = equation.objective
        if objective is None:
            raise ConfigurationError(
                f"LBFGS at stage {equation.name!r}: some of its parameters minimise its loss and some maximise it; "
                "expected a stage that minimises. Pass solve=mlo.testing.Newton() for this stage."
            )
        theta, (g, size) = start, equation.at(start)
        pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.history)
        for _ in range(self.max_steps):
            if size <= self.tolerance:
                return theta, None
            direction = _two_loops(g, pairs)
            found = self._searched(equation, objective, theta, g, direction)
            if found is None and not pairs:
                break
            if found is None:
                pairs.clear()
                continue
            moved, after = found
            step, change = moved - theta, after - g
            if torch.dot(step, change) > 0:
                pairs.append((step, change))
            theta, g, size = moved, after, torch.linalg.vector_norm(after).item()
        raise equation.failure(
            f"L-BFGS ended with a gradient of norm {size:.1e}; expected at most tolerance={self.tolerance:.1e}",
            "Train it further before the check, allow more max_steps, or loosen the tolerance.",
        )

    @staticmethod
    def _searched(
        equation: Equation, objective: Callable[[Tensor], float], theta: Tensor, g: Tensor, direction: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return a point along the direction that is accepted, and its gradient."""
        value, slope = objective(theta), torch.dot(g, direction).item()
        t = 1.0
        for _ in range(_HALVINGS):
            moved = theta + t * direction
            after, size = equation.at(moved)
            if math.isfinite(size):
                change = objective(moved) - value
                flat = change <= _FLAT * abs(value) and torch.dot(after, direction).item() <= -0.8 * slope
                if change <= 1e-4 * t * slope or flat:
                    return moved, after
            t /= 2
        return None


def _two_loops(g: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return minus the inverse Hessian that the pairs of steps and changes stand for, times g."""
    if not pairs:
        return torch.div(-g, max(1.0, torch.linalg.vector_norm(g).item()))
    q, weights = -g, []
    for step, change in reversed(pairs):
        weight = torch.dot(step, q) / torch.dot(step, change)
        q = q - weight * change
        weights.append(weight)
    step, change = pairs[-1]
    q = q * (torch.dot(step, change) / torch.dot(change, change))
    for (step, change), weight in zip(pairs, reversed(weights), strict=True):
        q = q + (weight - torch.dot(change, q) / torch.dot(step, change)) * step
    return q
