"""Differentiate through the optimizer steps that a stage has taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.autodiff import filled
from mlo.hypergradient.base import HypergradientMethod
from mlo.hypergradient.first_order import first_order_only
from mlo.optimizer_steps import State
from mlo.options import is_count
from mlo.products import DoubleBackward, Product
from mlo.products.directional import loss_gradients
from mlo.recording import RecordedStep, Recording
from mlo.reverse_pass import gradients
from mlo.stage_function import StageFunction, leaves
from mlo.status import SolveReport, Status
from mlo.vectors import Vector, norm


@dataclass(frozen=True)
class Unroll(HypergradientMethod):
    """θ*(x) is what the stage's last T optimizer steps make of θ at their beginning, and c goes back through them.

    With θ_{t+1} = u_t(θ_t, g_t, s_t) the optimizer's step (momentum and other state s, weight decay and clipping
    included) and g_t = ∂L/∂θ(θ_t, x) on the step's own batch, each step back gives

        c_g = (∂u/∂g)ᵀ c,    x̄ ← x̄ + (∂²L/∂θ∂x)ᵀ c_g,    c ← (∂u/∂θ)ᵀ c + (∂²L/∂θ²)ᵀ c_g,

    and likewise for the state. It is the exact derivative of the steps that were taken, whether the stage is solved or
    not, and converges to that of the solution with T where the steps converge to it (for plain SGD with a rate η where
    every eigenvalue of H is in (0, 2/η), by a factor of max |1 − η·eigenvalue| per step); what θ was before them counts
    as a constant, unless the stage starts over from a problem that it depends on (`start_from=` of `mlo.Problem`, as in
    MAML): then the rest of c goes to that problem.

    `Unroll(steps=1, product=mlo.CentralDifferences(epsilon=0.01))` at a stage with plain SGD is the second-order
    formula of the DARTS paper.

    Args:
        steps: T, the number of steps to go back; `None` for all `steps` of the stage's solve. At most those, since
            steps of an earlier solve were made for other values of x.
        keep_every: parameters and state are kept before every so many steps, and computed again in between; `None`
            for about √T. 1 computes nothing twice.
        product: how ∂²L/∂θ² and ∂²L/∂θ∂x are applied: as for `ImplicitMethod`.
        on_breakdown: see `HypergradientMethod`. Breaks down on non-finite values only.

    Raises:
        ConfigurationError: an option is out of range; the stage's optimizer is not SGD, Adam, AdamW, RMSprop or
            Adagrad of torch; the stage has taken no steps yet, or its parameters were changed since.

    Cost: per step back one Hessian–vector and one mixed product (with double backward one forward and three reverse
    passes), and with `keep_every` > 1 one forward and one reverse pass again. Memory: T/keep_every + keep_every copies
    of parameters and state, one graph at a time, and the batches of T steps. Central differences for T = 1 cost two
    forward and two reverse passes: they begin with the gradient that the step itself has formed (if it was not clipped,
    and the optimizer did not write to it).

    Source: Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through reversible learning",
    ICML 2015; Finn, Abbeel and Levine (MAML), ICML 2017; Shaban et al., "Truncated back-propagation for bilevel
    optimization", AISTATS 2019; Griewank, "Achieving logarithmic growth of temporal and spatial complexity", 1992.

    >>> import mlo, torch
    >>> class Stage(mlo.Problem):
    ...     def training_step(self, batch):               # w*(x) = x / 2 and H = 2
    ...         w, x = self.params["w"], self.deps.upper.params["x"]
    ...         return (w**2 - w * x).sum()
    >>> class Upper(mlo.Problem):
    ...     def training_step(self, batch):
    ...         return self.deps.stage.params["w"].sum()
    >>> low, top = (torch.nn.ParameterDict({name: torch.ones(1)}) for name in "wx")
    >>> sgd = torch.optim.SGD(low.parameters(), lr=0.25)
    >>> stage = Stage("stage", low, optimizer=sgd, depends_on=["upper"], steps=3, hypergradient=mlo.Unroll())
    >>> engine = mlo.Engine([stage, Upper("upper", top, depends_on=["stage"])])
    >>> engine.step()["stage"].steps
    3
    >>> engine.hypergradient("upper")["x"].item()         # (1 + 1/2 + 1/4) / 4
    0.4375

    """

    steps: int | None = None
    keep_every: int | None = None
    product: Product = field(default=DoubleBackward(), kw_only=True)

    differentiable: ClassVar[bool] = False
    allows_internal_responses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for option in ("steps", "keep_every"):
            if getattr(self, option) is not None and not is_count(getattr(self, option)):
                raise self.option_error(option, "an integer of at least 1, or None")
        if not isinstance(self.product, Product):
            raise self.option_error("product", "DoubleBackward(), ForwardOverReverse() or CentralDifferences()")

    @property
    def needs_second_derivatives(self) -> bool:
        """Whether every operation of the stage's loss must have a second derivative."""
        return isinstance(self.product, DoubleBackward)

    def recorded_steps(self, steps: int) -> int:
        """Return how many of the last of `steps` steps must be recorded."""
        return steps if self.steps is None else min(self.steps, steps)

    def kept_every(self, length: int) -> int:
        """Return before every how many of `length` steps parameters and state are kept."""
        return self.keep_every or max(1, math.isqrt(length))

    def pullback(
        self,
        stage: StageFunction,
        cotangents: Sequence[Tensor],
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs of all recorded steps, added up."""
        with torch.no_grad():
            recording = stage.recording()
            sweep = _Sweep(self.product, stage, recording, tuple(cotangents), needed)
            for first in sorted(recording.starts, reverse=True):
                sweep.back_to(first)
            result = sweep.result()
        finite = math.isfinite(norm([t for t in result if t is not None]))
        self.settle(
            stage,
            SolveReport(
                stage.name,
                type(self).__name__,
                Status.APPROXIMATE if finite else Status.NON_FINITE,
                iterations=recording.length,
                relative_residual=None,
                products=sweep.products,
                gradient_norm=sweep.gradient_norm,
            ),
        )
        return first_order_only(self, stage, result, (*cotangents, *solution, *inputs))


class _Sweep:
    """The way back through a recording."""

    def __init__(
        self,
        product: Product,
        stage: StageFunction,
        recording: Recording[Any],
        cotangents: Vector,
        needed: Sequence[bool],
    ) -> None:
        self._product, self._stage, self._recording, self._needed = product, stage, recording, needed
        self._cotangent = cotangents
        self._state_cotangent: Vector = ()
        self._position = recording.length
        self._collected: list[Tensor | None] = [None] * len(recording.inputs)
        self.products = 0
        #: of the stage where the last step began
        self.gradient_norm: float | None = None

    def back_to(self, first: int) -> None:
        """Go back to the step before which parameters and state were kept."""
        points = self._forward_from(first)
        for position in reversed(range(first, self._position)):
            self._step_back(position, *points.pop())
        self._position = first

    def result(self) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs."""
        for origin, c in zip(self._recording.origins, self._cotangent, strict=True):
            if origin is not None:
                self._collect(origin, c)
        return tuple(self._collected)

    def _forward_from(self, first: int) -> list[tuple[Vector, State]]:
        """Return parameters and state before each step from `first` to the one that the sweep has reached."""
        theta, state = self._recording.starts[first]
        points = [(theta, state)]
        for position in range(first, self._position - 1):
            step = self._recording.steps[position]
            found = loss_gradients(
                self._stage.at_step(step), leaves(theta), leaves(self._recording.inputs, False)
            ).theta
            theta, state = step.update.apply(theta, step.clipped(found), state)
            points.append((theta, state))
        return points

    def _step_back(self, position: int, theta: Vector, state: State) -> None:
        step = self._recording.steps[position]
        earlier = position > 0 or any(origin is not None for origin in self._recording.origins)
        at_step = self._stage.at_step(step)
        known = step.known_gradients
        with self._product.linearised(at_step, theta, self._recording.inputs, self._needed, known) as linearisation:
            values = [None if g is None else g.detach() for g in linearisation.gradient]
            if self.gradient_norm is None:
                self.gradient_norm = norm([g for g in self._stage.stationarity(values, theta) if g is not None])
            through_theta, through_gradient, through_state = self._through_update(step, theta, values, state)
            vector = linearisation.taking_part(through_gradient)
            if earlier:
                self.products += 1
                curved, mixed = linearisation.both_products(vector)
                along = iter(curved)
                through_theta = tuple(
                    t if g is None else t + next(along) for t, g in zip(through_theta, values, strict=True)
                )
            else:
                mixed = linearisation.mixed_product(vector)
            for i, share in enumerate(mixed):
                if share is not None:
                    self._collect(i, share)
        self._cotangent, self._state_cotangent = through_theta, through_state

    def _through_update(
        self, step: RecordedStep[Any], theta: Vector, values: Sequence[Tensor | None], state: State
    ) -> tuple[Vector, tuple[Tensor | None, ...], Vector]:
        """Return the cotangents of θ, of the gradient and of the state before a step, for those after it."""
        at = leaves(theta)
        g = tuple(None if v is None else v.requires_grad_() for v in values)
        before = leaves(state.tensors)
        live = [t for t in g if t is not None]
        with torch.enable_grad():
            after, left = step.update.apply(at, step.clipped(g), State(state.layout, before))
        outputs = [*after, *(left.tensors if self._state_cotangent else ())]
        given = [*self._cotangent, *self._state_cotangent]
        found = filled(gradients(outputs, [*at, *live, *before], given), [*at, *live, *before])
        moved = iter(found[len(at) : len(at) + len(live)])
        through_gradient = tuple(None if t is None else next(moved) for t in g)
        return found[: len(at)], through_gradient, found[len(at) + len(live) :]

    def _collect(self, position: int, cotangent: Tensor) -> None:
        before = self._collected[position]
        self._collected[position] = cotangent if before is None else before + cotangent
