"""A problem whose hypergradient is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mlo.engine import Engine
from mlo.hypergradient import HypergradientMethod
from mlo.testing.level import LEARNING_RATE, MIXED, WHOLE, Layout, Level, Numbers, engine_of
from mlo.testing.reference import (
    Inverse,
    Linearised,
    condition,
    linearised,
    nested_sweep,
    solved_in_order,
    solved_nested,
)


@dataclass(frozen=True)
class KnownProblem:
    """A graph of problems at their solutions, and the exact hypergradient of the upper one.

    Attributes:
        name: what it is.
        levels: its levels in solve order, each at its solution, the upper problem last.
        gradient: the exact hypergradient as one vector, in float64, found without `mlo`'s engine and methods.
        tags: what it asks of a method: `"symmetric"` and `"definite"` speak of the stages' Jacobians, `"nested"` of the
            graph, `"deep"` of more than three levels; further `"quadratic"` or `"non_quadratic"`, `"ill_conditioned"`.
        condition: the condition numbers of all stages added: how much a relative residual is magnified at most.

    >>> import mlo
    >>> from mlo.testing import zoo
    >>> problem = zoo.ridge()
    >>> problem.upper, sorted(problem.tags)
    ('penalties', ['definite', 'quadratic', 'symmetric'])
    >>> engine = problem.engine(mlo.ConjugateGradient())
    >>> import torch
    >>> torch.allclose(engine.hypergradient("penalties")["piece_2"], problem.exact["piece_2"])
    True

    """

    name: str
    levels: tuple[Level, ...]
    gradient: Tensor
    tags: frozenset[str]
    condition: float

    @property
    def upper(self) -> str:
        """The name of the upper problem."""
        return self.levels[-1].name

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages, in solve order."""
        return tuple(level.name for level in self.levels[:-1])

    @property
    def learning_rate(self) -> float:
        """The learning rate of every stage, which some methods take for their scale."""
        return LEARNING_RATE

    @property
    def exact(self) -> dict[str, Tensor]:
        """The exact hypergradient, by the names of the upper problem's trainable parameters."""
        return self._arranged(self.gradient)

    def engine(
        self,
        methods: HypergradientMethod | Mapping[str, HypergradientMethod],
        *,
        layouts: Mapping[str, Layout] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Engine:
        """Return a new engine at the solutions.

        Args:
            methods: the method of every stage, or a mapping from a stage's name to its method (`mlo`'s default for
                those that it lacks).
            layouts: how a level keeps its numbers in tensors; by default a 0-dim one, a matrix and a vector, beside a
                frozen and an unused one, where it has at least four.
            dtype: the precision.

        Raises:
            GraphError, ConfigurationError: the graph does not allow the methods.

        """
        return engine_of(self.levels, methods, layouts=layouts, dtype=dtype)

    def with_inverse(self, inverse: Inverse) -> dict[str, Tensor]:
        """Return what a method gives that puts `inverse(J)` in the place of each stage's J⁻¹.

        The exact formula of a truncated method: `lambda h: scale * torch.eye(len(h))` for `Identity(scale)`. In nested
        graphs it holds for subclasses of `mlo.ImplicitMethod`, which all take the derivative of λ = J⁻ᵀ c for
        λ′ = inverse(J)ᵀ (c′ − J′ᵀ λ); `inverse(Jᵀ)` must be `inverse(J)ᵀ` there.
        """
        if "nested" in self.tags:
            return self._arranged(nested_sweep(self.levels, inverse))
        return self._arranged(self._linearised.reverse_sweep(inverse))

    @cached_property
    def _linearised(self) -> Linearised:
        return linearised(self.levels)

    def _arranged(self, gradient: Tensor) -> dict[str, Tensor]:
        start = self.levels[-1].start
        return Numbers(start, MIXED if len(start) >= 4 else WHOLE).arranged(gradient)

    def __repr__(self) -> str:
        """Return the name and the tags."""
        return f"<KnownProblem {self.name}: {', '.join(sorted(self.tags))}>"


def known(
    name: str, levels: list[Level], *tags: str, gradient: Callable[[list[Level]], Tensor] | None = None
) -> KnownProblem:
    """Solve levels without nesting and return them with their exact hypergradient, by default by a dense sweep."""
    solved = solved_in_order(levels)
    linear = linearised(solved)
    exact = linear.reverse_sweep() if gradient is None else gradient(solved)
    return KnownProblem(name, tuple(solved), exact, frozenset(tags), condition(linear))


def known_nested(name: str, levels: list[Level], *tags: str) -> KnownProblem:
    """Solve levels that all read each other and return them with the exact hypergradient, by dense recursion."""
    solved, gradient, magnification = solved_nested(levels)
    return KnownProblem(name, tuple(solved), gradient, frozenset({"nested", *tags}), magnification)
