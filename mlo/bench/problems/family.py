"""`Family`: problems of one kind in several sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mlo.bench.problems.data import FASHION_FOLDER
from mlo.bench.stage import Case, Gradient, Stage
from mlo.errors import ConfigurationError


@dataclass(frozen=True)
class Request:
    """What a builder is asked for.

    Attributes:
        size: one of the family's.
        seed: of all that is random.
        data: the folder of Fashion-MNIST.

    """

    size: str
    seed: int = 0
    data: Path = FASHION_FOLDER


#: Returns the case in float64 on the CPU. Its losses get all their tensors by views and batches.
Builder = Callable[[Request], Case]


@dataclass(frozen=True)
class Family:
    """A kind of problem.

    Attributes:
        name: on the command line.
        summary: what it is, in one line.
        sizes: what `build` knows, the smallest first.
        build: the builder.

    """

    name: str
    summary: str
    sizes: tuple[str, ...]
    build: Builder

    def case(
        self,
        size: str,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        data: Path = FASHION_FOLDER,
    ) -> Case:
        """Return the problem of one size.

        Raises:
            ConfigurationError: there is no such size, or its data are not there.

        """
        if size not in self.sizes:
            raise ConfigurationError(f"problem {self.name!r}, size {size!r}: expected one of {', '.join(self.sizes)}.")
        return converted(self.build(Request(size, seed, data)), dtype, torch.device(device))


def converted(case: Case, dtype: torch.dtype, device: torch.device) -> Case:
    """Return a case in another precision, on another device. The exact hypergradient stays what it is."""

    def tensor(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.to(device, dtype) if t.is_floating_point() else t.to(device)

    def builder(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: build().to(device, dtype)

    def stage(s: Stage) -> Stage:
        return replace(
            s,
            module=builder(s.module),
            initial=None if s.initial is None else builder(s.initial),
            batches=tuple(pytree.tree_map(tensor, b) for b in s.batches),
        )

    exact = case.exact

    def moved() -> Gradient:
        assert exact is not None
        return {name: t.to(device) for name, t in exact().items()}

    return replace(case, stages=tuple(map(stage, case.stages)), exact=None if exact is None else moved)


def vector_module(**values: Tensor) -> Callable[[], nn.Module]:
    """Return a builder of a module that holds tensors under names."""
    return lambda: nn.ParameterDict({name: nn.Parameter(t.detach().clone()) for name, t in values.items()})


def seeded(build: Callable[[], nn.Module], seed: int) -> Callable[[], nn.Module]:
    """Return a builder whose module has the same random weights each time, in float64."""

    def built() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build().double()

    return built


def zero_linear(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    """Return a builder of a linear module with weights of zero."""

    def built() -> nn.Module:
        module = nn.Linear(inputs, outputs, dtype=torch.float64)
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        return module

    return built


def with_weights(build: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> Callable[[], nn.Module]:
    """Return a builder whose module has these weights."""

    def built() -> nn.Module:
        module = build()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(weights[name])
        return module

    return built
