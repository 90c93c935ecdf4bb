"""A level of a test problem as plain functions of vectors, and the same level as an `mlo.Problem`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlo.engine import Engine
from mlo.hypergradient import HypergradientMethod
from mlo.problem import Problem
from mlo.testing.flat import separated_by_shape

#: The learning rate of every stage of a test problem, which some methods take for their scale.
LEARNING_RATE = 0.1

#: A level's own vector, those of the levels that it reads, and its constants.
Function = Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Level:
    """One level: its loss as a function of its own vector, of those it reads, and of constants.

    Attributes:
        name: the problem's name.
        reads: the levels that the loss reads.
        loss: (own, others, constants) ↦ scalar.
        start: where the level stands, in float64: a point close to its solution; for the upper problem the point at
            which its hypergradient is known.
        constants: the tensors in the loss, in float64.
        stationarity: (own, others, constants) ↦ g, for a loss whose gradient is not conservative; `None` where g is the
            gradient of the loss.
        decay: an L2 decay that the optimizer adds.
        maximise: whether the optimizer maximises the loss.

    """

    name: str
    reads: tuple[str, ...]
    loss: Function
    start: Tensor
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    stationarity: Function | None = None
    decay: float = 0.0
    maximise: bool = False

    def gradient(self, own: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """Return g, which is zero at the solution, for `torch.func` to differentiate."""
        if self.stationarity is not None:
            return self.stationarity(own, others, self.constants)
        g: Tensor = torch.func.grad(lambda v: self.loss(v, others, self.constants))(own)
        return (-g if self.maximise else g) + self.decay * own


class _Field(torch.autograd.Function):
    """The number 0, whose gradient in θ is a given v(θ)."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        ctx.save_for_forward(v)
        return theta.new_zeros(())

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return cotangent * v, None

    @staticmethod
    def jvp(ctx: Any, theta: Tensor | None, _: Tensor | None) -> Tensor:
        (v,) = ctx.saved_tensors
        return v.new_zeros(()) if theta is None else torch.dot(v, theta)


def with_gradient(theta: Tensor, v: Tensor) -> Tensor:
    """Return a loss of value 0 whose gradient in θ is v, with the derivatives that v has as a function of θ.

    This is how a game or a fixed-point equation is stated as a stage: the Jacobian ∂v/∂θ need not be symmetric.
    (Writing ⟨v.detach(), θ⟩ gives the same gradient, but a Jacobian of zero.)

    >>> import torch
    >>> theta = torch.ones(2, requires_grad=True)
    >>> rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> torch.autograd.grad(with_gradient(theta, rotation @ theta), theta)[0].tolist()
    [1.0, -1.0]

    """
    return _Field.apply(theta, v)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Layout:
    """How the n numbers of a level are kept in tensors.

    Attributes:
        shapes: the shapes of the pieces, in the order of the numbers; the last one takes what is left if it
            is `None`.
        order: the order in which they are registered with the module, and so passed to the optimizer.
        frozen: pieces that are parameters without `requires_grad`.
        extras: add a frozen parameter and a trainable one that no loss reads.

    """

    shapes: tuple[tuple[int, ...] | None, ...] = (None,)
    order: tuple[int, ...] | None = None
    frozen: tuple[int, ...] = ()
    extras: bool = False

    def resolved(self, size: int) -> list[tuple[int, ...]]:
        """Return the shapes for `size` numbers."""
        taken = sum(math.prod(s) for s in self.shapes if s is not None)
        return [(size - taken,) if s is None else s for s in self.shapes]


#: One vector.
WHOLE = Layout()
#: A 0-dim tensor, a matrix, a vector; beside them a frozen and an unused parameter.
MIXED = Layout(((), (2, 1), None), order=(1, 0, 2), extras=True)


class Numbers(nn.Module):
    """The numbers of a level in several parameters; called, it returns them in one vector."""

    def __init__(self, value: Tensor, layout: Layout) -> None:
        """Keep copies of the numbers."""
        super().__init__()
        shapes = layout.resolved(len(value))
        pieces = separated_by_shape(value, shapes)
        self.names = tuple(f"piece_{i}" for i in range(len(pieces)))
        for i in layout.order or range(len(pieces)):
            frozen = i in layout.frozen
            self.register_parameter(self.names[i], nn.Parameter(pieces[i].clone(), requires_grad=not frozen))
        if layout.extras:
            self.register_parameter("frozen", nn.Parameter(value.new_ones(2), requires_grad=False))
            self.register_parameter("unused", nn.Parameter(value.new_ones(3)))

    def forward(self) -> Tensor:
        """Return the vector."""
        return torch.cat([getattr(self, name).reshape(-1) for name in self.names])

    def arranged(self, value: Tensor) -> dict[str, Tensor]:
        """Return a gradient, given for the whole vector, by the names of the trainable parameters."""
        pieces = separated_by_shape(value, [tuple(getattr(self, name).shape) for name in self.names])
        found = dict(zip(self.names, pieces, strict=True))
        return {n: found.get(n, torch.zeros_like(p)) for n, p in self.named_parameters() if p.requires_grad}


#: Makes the optimizer of a level.
OptimizerFactory = Callable[[Numbers], torch.optim.Optimizer | None]


class LevelProblem(Problem):
    """A level as a problem of an engine."""

    def __init__(
        self,
        level: Level,
        method: HypergradientMethod | None,
        layout: Layout,
        dtype: torch.dtype,
        optimizer: OptimizerFactory | None = None,
        steps: int = 1,
    ) -> None:
        """Put the level's numbers and constants in tensors of `dtype`."""
        module = Numbers(level.start.to(dtype), layout)
        super().__init__(
            level.name,
            module,
            optimizer=_sgd(level, module) if optimizer is None else optimizer(module),
            depends_on=level.reads,
            hypergradient=method,
            steps=steps,
        )
        self.level = level
        self.kept = {name: t.to(dtype) for name, t in level.constants.items()}

    def training_step(self, batch: object) -> Tensor:
        """Return the level's loss."""
        return self.level.loss(self(), {d: self.deps[d]() for d in self.depends_on}, self.kept)


def _sgd(level: Level, module: Numbers) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, weight_decay=level.decay, maximize=level.maximise)


def engine_of(
    levels: Sequence[Level],
    methods: HypergradientMethod | Mapping[str, HypergradientMethod],
    *,
    layouts: Mapping[str, Layout] | None = None,
    dtype: torch.dtype = torch.float64,
    optimizers: Mapping[str, OptimizerFactory] | None = None,
    steps: int = 1,
) -> Engine:
    """Return an engine over levels in solve order, the upper problem last.

    Args:
        levels: the levels, each at its solution.
        methods: the method of every stage, or of each.
        layouts: how a level keeps its numbers; `MIXED` where it has at least four, and `WHOLE` else.
        dtype: the precision of parameters and constants.
        optimizers: what makes the optimizer of a level, where it is not plain SGD.
        steps: how many steps a stage takes when it is solved.

    """
    layouts, optimizers = layouts or {}, optimizers or {}
    problems = []
    for level in levels:
        upper = level is levels[-1]
        method = methods.get(level.name) if isinstance(methods, Mapping) else methods
        layout = layouts.get(level.name, MIXED if len(level.start) >= 4 else WHOLE)
        problems.append(
            LevelProblem(
                level, None if upper else method, layout, dtype, optimizers.get(level.name), 1 if upper else steps
            )
        )
    return Engine(problems)
