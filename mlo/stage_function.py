"""What a response node needs to know of its stage: how to evaluate its loss at any point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from mlo.errors import ConfigurationError
from mlo.losses import unreached
from mlo.recording import RecordedStep, Recording
from mlo.reverse_pass import gradients, reverse_pass
from mlo.status import SolveReport
from mlo.vectors import Vector


class LossHere(ABC):
    """The loss at the point that a span has bound; each call evaluates it."""

    @abstractmethod
    def __call__(self) -> Tensor:
        """Return the loss with its graph."""

    def value_and_gradients(self, at: Sequence[Tensor]) -> tuple[float, tuple[Tensor | None, ...]]:
        """Return the loss and its gradient in `at`, `None` where it does not reach or no gradient is needed."""
        loss = self()
        return loss.item(), gradients((loss,), at)

    def gradient_and_mixed_product(
        self, theta: Vector, x: Vector, vector: Sequence[Tensor], *, gradient_too: bool
    ) -> tuple[tuple[Tensor | None, ...] | None, tuple[Tensor | None, ...]]:
        """Return ∂L/∂θ and vᵀ ∂²L/∂θ∂x, `None` where the loss does not reach or no gradient is needed.

        The first may be left out where it is not wanted.
        """
        slope = gradients((self(),), theta, create_graph=True)
        return slope, gradients(slope, x, vector)


class StageFunction(ABC):
    """One stage's loss L(θ, x) as a function of its solution θ and of its inputs x.

    The function is the same at every evaluation: same batches, same random draws, buffers untouched.
    θ and x are sequences of tensors, one per parameter.

    Attributes:
        name: the stage's name, for reports.
        title: how errors name its loss.
        learning_rates: one per tensor of θ, or `None` where there is no optimizer.
        weight_decays: the L2 penalty that the optimizer itself adds, one coefficient per tensor of θ: the
            stationary point is the one of L + Σ ½·decay·‖θᵢ‖².
        signs: −1 for each tensor of θ along which the optimizer maximises the loss, else 1.
        warm_starts: where solvers keep their last solution; `None` where nothing outlives the node.
        reports_solves: whether anybody reads the reports of solves that did not break down.
        asks_for_gradients: whether the loss is another one where θ needs no gradient (`if p.requires_grad`), or may be.
        differences_checked: whether what is looked at in the first central differences has been.
        disposable_cotangents: whether nobody needs the cotangents of a pullback after it, so that a method may write to
            them.

    """

    name: str
    title: str
    learning_rates: tuple[float, ...] | None
    weight_decays: tuple[float, ...]
    signs: tuple[float, ...]
    warm_starts: MutableMapping[str, Vector] | None = None
    reports_solves = True
    asks_for_gradients = True
    differences_checked = False
    disposable_cotangents = False
    _solved = False

    def first_solve(self) -> bool:
        """Whether no solve was made at this node before: the first is the one that the next step's resembles.

        Those that follow are asked for by the products of a stage above, or by a derivative, and have right-hand sides
        of their own.
        """
        first, self._solved = not self._solved, True
        return first

    @abstractmethod
    def evaluation(self, solution: Sequence[Tensor], inputs: Sequence[Tensor]) -> AbstractContextManager[LossHere]:
        """Bind the two points for a span and hand out the function that evaluates the loss there.

        It may be called several times, and is the same function each time.
        Backward passes through the loss must run inside the span too: activation checkpointing runs the
        forward pass again during the backward pass.
        """

    @abstractmethod
    def record(self, report: SolveReport) -> None:
        """Take note of a solve."""

    def recording(self) -> Recording[Any]:
        """Return the record of the stage's last steps; only for methods with `recorded_steps`."""
        raise ConfigurationError(f"stage {self.name!r} keeps no record of optimizer steps; expected one of an engine.")

    def at_step(self, step: RecordedStep[Any]) -> StageFunction:
        """Return the loss of a recorded step: its batches, and no penalty of the optimizer's, which its formula has."""
        raise ConfigurationError(f"stage {self.name!r} keeps no record of optimizer steps; expected one of an engine.")

    def update_derivative(self, gradients: Sequence[Tensor | None]) -> Vector:
        """Return the diagonal of the derivative of the optimizer's next update in the gradients of the loss."""
        raise ConfigurationError(f"stage {self.name!r} has no optimizer; expected one of an engine that has.")

    def flags_check_due(self) -> bool:
        """Whether it is time to find out `asks_for_gradients` anew; then it is set."""
        return False

    def repetition_check_due(self) -> bool:
        """Whether a loss that is very different on both sides of a difference is to be evaluated once more."""
        return True

    def repetition_check_next(self) -> bool:
        """Whether the next time it would be; if not, this one is counted."""
        return True

    def repetition_failed(self) -> None:  # noqa: B027  (most stages have nothing to note)
        """Take note that it was another function when it was evaluated once more."""

    def symmetry_check_due(self) -> bool:
        """Whether it is time to compare ∂²L/∂x∂θ with ∂²L/∂θ∂x (see `warn_of_asymmetry`)."""
        return False

    def gradient(self, loss: Tensor, solution: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return g = ∂(±L + Σ ½·decay·‖θᵢ‖²)/∂θ as a differentiable function, `None` where L does not reach.

        At the stage's solution g = 0: it is the equation that the implicit function theorem is applied to.
        Parameters that the loss does not reach take no part in it.
        """
        gradients: tuple[Tensor | None, ...] = (None,)
        if loss.requires_grad:
            gradients = reverse_pass((loss,), tuple(solution), create_graph=True)
        if all(g is None for g in gradients):
            raise unreached(self.title)
        return self.stationarity(gradients, solution)

    def signed(self, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return `vector` with the signs that g has beside the gradient of the loss."""
        signs = self.signs
        if signs.count(1.0) == len(signs):
            return vector
        return [sign * v for sign, v in zip(signs, vector, strict=True)]

    def stationarity(self, gradients: Sequence[Tensor | None], solution: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return g for gradients of the loss itself, as the optimizer sees them: with its sign and its L2 decay."""
        decays, signs = self.weight_decays, self.signs
        if not any(decays) and signs.count(1.0) == len(signs):
            return tuple(gradients)
        return tuple(
            None if g is None else _stationarity(g, theta, decay, sign)
            for g, theta, decay, sign in zip(gradients, solution, decays, signs, strict=True)
        )


def _stationarity(gradient: Tensor, theta: Tensor, decay: float, sign: float) -> Tensor:
    signed = -gradient if sign < 0 else gradient
    return signed + decay * theta if decay else signed


def leaves(tensors: Sequence[Tensor], requires_grad: bool | Sequence[bool] = True) -> Vector:
    """Return fresh leaves that share storage with `tensors`: gradients with respect to them are partial ones."""
    if isinstance(requires_grad, bool):
        return tuple([t.detach().requires_grad_(requires_grad) for t in tensors])
    return tuple([t.detach().requires_grad_(flag) for t, flag in zip(tensors, requires_grad, strict=True)])
