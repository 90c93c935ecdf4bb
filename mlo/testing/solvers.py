"""Solvers strong enough to re-solve a stage to rounding: the reference that a method is compared with.

They share nothing with the hypergradient methods and need first derivatives of a stage's loss only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.errors import ConfigurationError, LossError
from mlo.options import is_count, is_number
from mlo.testing.errors import NotSolvedError

# Length of the shift for a column of the Jacobian: the cube root of the rounding unit of float64.
_SHIFT = 6e-6
# Below this ratio of ‖g‖ after and before a step the Jacobian is as good as new.
_FAST = 0.1
# A step that leaves more than this of ‖g‖ is not taken unless with a new Jacobian.
_SLOW = 0.5
# Smaller shares of the largest singular value count as zero.
_SINGULAR = 1e-13
# A step below this share of ‖θ‖ is the last one, whatever the age of the Jacobian.
_ROUNDING = 1e-13
# A stage is at a stationary point if Newton's step is below this share of ‖θ‖: one that may be a saddle on purpose.
_SOLVED = 1e-3
# Changes of a loss below this share of it are rounding.
_FLAT = 1e-14
# Halvings of a step before the search for a smaller ‖g‖ ends.
_HALVINGS = 30


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
        if not torch.isfinite(jacobian).all() or singular[-1] <= _SINGULAR * singular[0]:
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
        _check_count("Newton", "max_size", self.max_size)
        _check_positive("Newton", "tolerance", self.tolerance)
        _check_count("Newton", "max_steps", self.max_steps)

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
            bent = values.abs().clamp(min=_SINGULAR * max(1.0, values.abs().max().item()))
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
        _check_positive("LBFGS", "tolerance", self.tolerance)
        _check_count("LBFGS", "max_steps", self.max_steps)
        _check_count("LBFGS", "history", self.history)

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
        return -g / max(1.0, torch.linalg.vector_norm(g).item())  # type: ignore[no-any-return]
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


def _relative_length(step: Tensor, theta: Tensor) -> float:
    return torch.linalg.vector_norm(step).item() / max(1.0, torch.linalg.vector_norm(theta).item())  # type: ignore[no-any-return]


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


def _check_count(solver: str, option: str, value: object) -> None:
    if not is_count(value):
        raise ConfigurationError(f"{solver}({option}={value!r}): expected an integer of at least 1.")


def _check_positive(solver: str, option: str, value: object) -> None:
    if not is_number(value) or value <= 0:  # type: ignore[operator]
        raise ConfigurationError(f"{solver}({option}={value!r}): expected a positive number.")
