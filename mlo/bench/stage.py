"""A multi-level problem as every library can read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

#: The hypergradient of the upper stage, by the names of its parameters.
Gradient = dict[str, Tensor]


class View(Protocol):
    """How a loss sees one stage, whatever library evaluates it."""

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters of the evaluation at hand by name."""

    def __call__(self, *args: Any) -> Any:
        """Run the stage's module with these parameters."""


#: (own view, those of the stages that it reads by name, batch) -> a scalar.
Loss = Callable[[View, Mapping[str, View], Any], Tensor]


class ModuleView:
    """The view of a module's own parameters, looked up once."""

    def __init__(self, module: nn.Module) -> None:
        """Look them up."""
        self.params: Mapping[str, Tensor] = dict(module.named_parameters())
        self._run = module

    def __call__(self, *args: Any) -> Any:
        """Run the module."""
        return self._run(*args)


@dataclass(frozen=True)
class Stage:
    """One stage: a module, its loss, and how it is trained.

    Attributes:
        name: a Python identifier.
        module: builds the module anew, always with the same weights: those at which hypergradients are taken.
        loss: what the stage minimises.
        reads: the names of the stages whose parameters the loss reads, earlier and later ones.
        batches: what the loss gets, in turn; `(None,)` where there is no data.
        initial: builds the module with the weights that training and unrolling begin with; `None`: as `module`.
        learning_rate: of the stage's optimizer in training.
        momentum: of SGD.
        steps: optimizer steps for each step of the stage above.
        optimizer: its kind. Both without weight decay.
        scale: what stands for H⁻¹ in "identity" and "fd", and is the factor of "neumann" and the step of "unroll":
            1/λmax where the largest eigenvalue of the Hessian is known. `None`: the learning rate.

    """

    name: str
    module: Callable[[], nn.Module]
    loss: Loss
    reads: tuple[str, ...]
    batches: Sequence[Any] = (None,)
    initial: Callable[[], nn.Module] | None = None
    learning_rate: float = 0.1
    momentum: float = 0.0
    steps: int = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    scale: float | None = None

    @property
    def factor(self) -> float:
        """The multiple of the identity that every library takes for H⁻¹."""
        return self.learning_rate if self.scale is None else self.scale

    def beginning(self) -> nn.Module:
        """Return a new module with the weights that training begins with."""
        return (self.initial or self.module)()


@dataclass(frozen=True)
class Case:
    """A problem of one size, with its data.

    Attributes:
        name: of the problem in the registry.
        size: of the problem, as the builder was given it.
        stages: in solve order, the upper one last (as `mlo.Engine` takes them).
        exact: the hypergradient of the upper stage at the weights that `module` of each stage builds, computed without
            any of the libraries; `None` where it is not known.
        nested: whether a stage's own loss contains responses that depend on the stage.

    """

    name: str
    size: str
    stages: tuple[Stage, ...]
    exact: Callable[[], Gradient] | None = None
    nested: bool = False

    @property
    def upper(self) -> Stage:
        """The stage whose hypergradient is asked for."""
        return self.stages[-1]

    @property
    def lower(self) -> tuple[Stage, ...]:
        """The other stages, in solve order."""
        return self.stages[:-1]

    @property
    def two_levels(self) -> bool:
        """Whether there is one stage under the upper one."""
        return len(self.stages) == 2

    def metric(self, modules: Mapping[str, nn.Module]) -> float:
        """Return the outer objective, the mean of the upper loss over all its batches, at the modules' weights.

        The modules are in the mode in which they train; their buffers are left as they are.
        """
        views = {name: ModuleView(module) for name, module in modules.items()}
        kept = {name: {n: b.clone() for n, b in module.named_buffers()} for name, module in modules.items()}
        upper, own = self.upper, views[self.upper.name]
        with torch.no_grad():
            losses = [upper.loss(own, {name: views[name] for name in upper.reads}, batch) for batch in upper.batches]
            for name, module in modules.items():
                for n, b in module.named_buffers():
                    b.copy_(kept[name][n])
        return float(torch.stack(losses).mean())
