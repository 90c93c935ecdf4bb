"""The two abstract bases of every way to form products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mlo.stage_function import StageFunction
from mlo.vectors import Vector


class Linearisation(ABC):
    """A stage's equation g(θ, x) = 0 linearised at one point: products with H = ∂g/∂θ and G = ∂g/∂x.

    A vector has one tensor for each of θ that the loss reaches; the others take no part.

    Attributes:
        gradient: g at the point, `None` for parameters that the loss does not reach.

    """

    gradient: tuple[Tensor | None, ...]

    @abstractmethod
    def product(self, vector: Sequence[Tensor]) -> Vector:
        """Return Hᵀ·vector."""

    @abstractmethod
    def transposed_product(self, vector: Sequence[Tensor]) -> Vector:
        """Return H·vector."""

    @abstractmethod
    def mixed_product(self, vector: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return Gᵀ·vector, one tensor for each of x that is wanted and that the loss reaches; else `None`."""

    def both_products(self, vector: Sequence[Tensor]) -> tuple[Vector, tuple[Tensor | None, ...]]:
        """Return Hᵀ·vector and Gᵀ·vector, the last products that are asked for."""
        return self.product(vector), self.mixed_product(vector)

    def taking_part(self, tensors: Sequence[Tensor | None]) -> Vector:
        """Return the tensors that belong to parameters that the loss reaches."""
        return tuple([t for t, g in zip(tensors, self.gradient, strict=True) if g is not None and t is not None])


@dataclass(frozen=True)
class Product(ABC):
    """A way to form the products of a solve; an option of every implicit method."""

    #: Whether a solve with these products can be differentiated again, and may meet responses in the stage's loss.
    differentiable: ClassVar[bool] = False

    @abstractmethod
    def linearised(
        self,
        stage: StageFunction,
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        known: Sequence[Tensor | None] | None = None,
    ) -> AbstractContextManager[Linearisation]:
        """Linearise a stage for the span of a solve.

        Args:
            stage: the stage.
            solution: θ.
            inputs: x.
            needed: for each of x, whether its mixed product will be wanted.
            known: ∂L/∂θ there, where it was formed before; a product that needs its graph evaluates it all the same.

        """

    def only_mixed_product(
        self,
        stage: StageFunction,
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        vector: Sequence[Tensor],
        *,
        gradient_too: bool,
    ) -> tuple[tuple[Tensor | None, ...] | None, tuple[Tensor | None, ...]]:
        """Return g and Gᵀ·vector where no product with H is wanted; `vector` has a tensor for each of θ.

        The first may be left out where it is not wanted.
        """
        with self.linearised(stage, solution, inputs, needed) as linearisation:
            return linearisation.gradient, linearisation.mixed_product(linearisation.taking_part(vector))
