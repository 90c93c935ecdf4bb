"""The one abstract base of every hypergradient method."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from mlo.errors import BreakdownError, BreakdownWarning, ConfigurationError
from mlo.stage_function import StageFunction
from mlo.status import SolveReport
from mlo.traced_pullback import TracedPullback

Policy = Literal["warn", "raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class HypergradientMethod(ABC):
    """The backward rule of a solved stage: from a cotangent of the solution to those of its inputs.

    With θ*(x) = argmin L(θ, x), H = ∂²L/∂θ² and G = ∂²L/∂θ∂x, the implicit function theorem gives
    c ↦ −Gᵀ H⁻ᵀ c. A method is one way of computing or approximating this. Subclasses that solve a linear
    system subclass `ImplicitMethod` and implement `solve`; any other backward rule implements `pullback`.

    Args:
        on_breakdown: what happens when a solve breaks down (`Status.ok` is false): `"warn"` gives a
            `BreakdownWarning` and uses the result, `"raise"` raises `BreakdownError`, and `"skip"` makes
            `Engine.step` leave out the optimizer step that asked for the hypergradient (outside of
            `Engine.step` it raises). The parameters are untouched in each case.

    """

    on_breakdown: Policy = "warn"

    #: Whether the backward rule can itself be differentiated, which a stage above one that nests it needs.
    differentiable: ClassVar[bool] = True
    #: Whether the stage's own loss may contain responses that depend on the stage.
    allows_internal_responses: ClassVar[bool] = True
    #: Whether the results of `pullback` are new tensors that nothing else refers to, which the caller may write to.
    hands_over: ClassVar[bool] = False
    #: Whether `pullback` writes to its cotangents where `stage.disposable_cotangents` says that it may.
    uses_up_cotangents: ClassVar[bool] = False
    #: Whether any gradient passes at all.
    carries_gradient: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass with a rule of its own say for itself what it does with cotangents and results."""
        super().__init_subclass__(**kwargs)
        if "pullback" in cls.__dict__:
            cls.hands_over = cls.__dict__.get("hands_over", False)
            cls.uses_up_cotangents = cls.__dict__.get("uses_up_cotangents", False)

    def __post_init__(self) -> None:
        """Check the options."""
        if self.on_breakdown not in get_args(Policy):
            raise self.option_error("on_breakdown", f"one of {', '.join(map(repr, get_args(Policy)))}")

    @property
    def needs_learning_rate(self) -> bool:
        """Whether the method takes a scale from the stage's optimizer."""
        return False

    @property
    def needs_update_derivative(self) -> bool:
        """Whether the method asks for the derivative of the optimizer's update."""
        return False

    @property
    def needs_second_derivatives(self) -> bool:
        """Whether every operation of the stage's loss must have a second derivative."""
        return False

    @property
    def keeps_solutions(self) -> bool:
        """Whether solves start from the solution of the step before."""
        return False

    def recorded_steps(self, steps: int) -> int:
        """Return how many of the last of a solve's `steps` optimizer steps must be recorded for the method."""
        return 0

    def kept_every(self, length: int) -> int:
        """Return before every how many of `length` recorded steps parameters and state are kept."""
        return 1

    @abstractmethod
    def pullback(
        self,
        stage: StageFunction,
        cotangents: Sequence[Tensor],
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of `inputs` for the cotangents of `solution`.

        Args:
            stage: the stage's loss, to be evaluated with `stage.evaluation(solution, inputs)`.
            cotangents: c, one tensor for each of `solution`.
            solution: θ*, the stage's present parameters.
            inputs: x, the parameters of the problems that the stage depends on.
            needed: for each of `inputs`, whether its cotangent is wanted; `None` may be returned elsewhere,
                and for inputs that the loss does not reach.

        Called in grad mode if and only if the result must be differentiable.

        """

    def traced_pullback(self) -> TracedPullback | None:
        """Return `pullback` as arithmetic of a known length, if it is that: then it can be compiled."""
        return None

    def option_error(self, option: str, expected: str) -> ConfigurationError:
        """Return the error for an option that is out of range."""
        got = getattr(self, option)
        return ConfigurationError(f"{type(self).__name__}({option}={got!r}): expected {expected}.")

    def settle(self, stage: StageFunction, report: SolveReport) -> None:
        """Record how a solve ended and apply the policy for breakdowns."""
        stage.record(report)
        if report.status.ok:
            return
        if self.on_breakdown == "warn":
            # Without figures, so that Python's filters show it once and not at every step.
            text = f"{report.stage}: {report.method} ended with {report.status.name}. {report.status.remedy}"
            warnings.warn(text, BreakdownWarning, stacklevel=2)
            return
        raise BreakdownError(f"{report}. {report.status.remedy}", report, skip=self.on_breakdown == "skip")
