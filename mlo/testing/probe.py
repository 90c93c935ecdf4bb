"""A small problem on which the laws are tried."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mlo.engine import Engine
from mlo.errors import MloWarning
from mlo.hypergradient import HypergradientMethod
from mlo.testing.level import WHOLE, Level, engine_of
from mlo.testing.reference import condition, linearised, solved_in_order
from mlo.testing.watched import Watch, watched

Vectors = Mapping[str, Tensor]

#: Numbers of the stage, and those of the upper problem that it reads.
SIZE, READ = 6, 4
#: How many steps a stage takes for methods that differentiate through steps.
STEPS = 3


class Probe:
    """Runs one method on variants of one small problem.

    A stage with six numbers stands under an upper problem whose loss is a·θ*(x), so that the gradient in x is the
    method's answer −Gᵀ H⁻ᵀ a and nothing else.
    """

    def __init__(self, method: HypergradientMethod, dtype: torch.dtype) -> None:
        """Draw the problem's data from a generator of its own."""
        self.method, self.dtype = method, dtype
        self._generator = torch.Generator().manual_seed(0)
        q = torch.linalg.qr(self.normal(SIZE, SIZE)).Q
        self.hessian = q @ torch.diag(torch.linspace(1.0, 5.0, SIZE, dtype=torch.float64)) @ q.T
        self.coupling = torch.cat([self.normal(SIZE, READ), torch.zeros(SIZE, 1, dtype=torch.float64)], dim=1)
        self.offset = self.normal(SIZE)
        self.point = self.normal(READ + 1)
        self.a, self.b = self.normal(SIZE), self.normal(SIZE)
        self._stage = solved_in_order([self.stage(), self.upper(self.a)])[0]
        self._condition = condition(linearised([self._stage, self.upper(self.a)]))

    def normal(self, *shape: int) -> Tensor:
        """Return random numbers in float64."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    @property
    def tolerance(self) -> float:
        """How much two answers may differ that are equal but for rounding."""
        return same_answer(self.dtype)

    def stage(self, *, hessian: Tensor | None = None, curved: bool = True) -> Level:
        """Return the stage ½θᵀAθ + Σ cosh(θ/2) − θᵀ(b + Bx)."""
        constants = {"A": self.hessian if hessian is None else hessian, "B": self.coupling, "b": self.offset}
        start = torch.zeros(SIZE, dtype=torch.float64)
        return Level("w", ("top",), _curved_stage if curved else _stage, start, constants)

    def upper(self, a: Tensor, loss: Callable[[Tensor, Vectors, Vectors], Tensor] | None = None) -> Level:
        """Return the upper problem a·θ, with a term in its last number alone, so that it has a gradient anyway."""
        return Level("top", ("w",), loss or _linear, self.point, {"a": a})

    def solved(self, a: Tensor, stage: Level | None = None) -> list[Level]:
        """Return both levels, the stage (by default the usual one) at its solution."""
        upper = self.upper(a)
        return [self._stage, upper] if stage is None else solved_in_order([stage, upper])

    def engine(self, levels: Sequence[Level], method: HypergradientMethod, **options: Any) -> Engine:
        """Return an engine at the solution."""
        return engine_of(levels, method, dtype=self.dtype, **{"layouts": {"w": WHOLE, "top": WHOLE}, **options})

    def answer(self, levels: Sequence[Level], **options: Any) -> tuple[Tensor, Watch]:
        """Return the method's answer in float64, and how it was found."""
        method, watch = watched(self.method)
        engine = ready(lambda steps: self.engine(levels, method, steps=steps, **options), method)
        watch.reports.clear()
        watch.residuals.clear()
        found = engine.hypergradient("top")["piece_0"]
        return found[:READ].double(), watch

    def differs(self, found: Tensor, expected: Tensor, watches: Sequence[Watch] = ()) -> str:
        """Return how two answers differ, or nothing if they are equal up to rounding and what solves leave over."""
        residual = max((w.worst_residual for w in watches if w.converged), default=0.0)
        left_over = 100 * self._condition * residual
        size = max(expected.norm().item(), found.norm().item())
        error = (found - expected).norm().item() / size if size else 0.0
        if error <= max(self.tolerance, left_over):
            return ""
        return f"relative difference {error:.1e}" if torch.isfinite(found).all() else "not finite"


def same_answer(dtype: torch.dtype) -> float:
    """Return how much two answers may differ that are equal but for rounding, central differences allowed for."""
    return min(10 * math.sqrt(torch.finfo(dtype).eps), 0.3)


def ready(build: Callable[[int], Engine], method: HypergradientMethod) -> Engine:
    """Return an engine of which `method` can give a hypergradient.

    One that differentiates through steps needs some: the stages take them at their solutions, where they stay.
    """
    if not method.recorded_steps(STEPS):
        return build(1)
    engine = build(STEPS)
    upper = engine.problems[engine.graph.names[-1]]
    upper.warmup = 1
    with quiet():
        engine.step()
    return engine


@contextmanager
def quiet() -> Iterator[None]:
    """Let the library's warnings pass, since a report tells what matters, and warnings may be errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MloWarning)
        yield


def _stage(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    return 0.5 * own @ c["A"] @ own - own @ (c["b"] + c["B"] @ others["top"])


def _curved_stage(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    return _stage(own, others, c) + torch.cosh(0.5 * own).sum()


def _linear(own: Tensor, others: Vectors, c: Vectors) -> Tensor:
    return 0.5 * own[-1].square() + c["a"] @ others["w"]
