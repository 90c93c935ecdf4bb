"""Products by reverse mode over reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar

import torch
from torch import Tensor

from mlo.autodiff import filled
from mlo.losses import unreached
from mlo.products.base import Linearisation, Product
from mlo.reverse_pass import gradients, reverse_pass
from mlo.stage_function import StageFunction, leaves
from mlo.vectors import Vector


@dataclass(frozen=True)
class DoubleBackward(Product):
    """Hᵀv = ∂(g·v)/∂θ and Gᵀv = ∂(g·v)/∂x by a second reverse pass over the graph of g = ∂L/∂θ.

    Exact to rounding. The loss is evaluated once, and one graph serves all products of a solve.

    Cost: one forward and one reverse pass to set up, one reverse pass through the graph of the gradient (about two
    reverse passes through the loss) per product; the memory of that graph.

    Needs second derivatives of every operation in the loss. The only product that can itself be differentiated,
    which nested graphs need.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994.

    >>> import mlo, torch
    >>> x = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)   # w*(x) = asinh x
    >>> method = mlo.ConjugateGradient(product=mlo.DoubleBackward())
    >>> w = mlo.best_response(lambda w, x: torch.cosh(w) - w * x, torch.asinh(x.detach()), x, method)
    >>> (first,) = torch.autograd.grad(w, x, create_graph=True)
    >>> (second,) = torch.autograd.grad(first, x)
    >>> round(first.item(), 6), round(second.item(), 6)   # 1 / √(1 + x²) and −x / (1 + x²)^1.5
    (0.8, -0.384)

    """

    differentiable: ClassVar[bool] = True

    def linearised(
        self,
        stage: StageFunction,
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        known: Sequence[Tensor | None] | None = None,
    ) -> _GraphSpan:
        """Build the graph of the gradient."""
        return _GraphSpan(stage, leaves(solution), leaves(inputs, needed))

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
        """Form both at once, which may be one compiled function."""
        if type(self).linearised is not DoubleBackward.linearised:  # a subclass has products of its own
            return super().only_mixed_product(stage, solution, inputs, needed, vector, gradient_too=gradient_too)
        theta, x = leaves(solution), leaves(inputs, needed)
        with torch.enable_grad(), stage.evaluation(theta, x) as evaluate:
            slope, mixed = evaluate.gradient_and_mixed_product(
                theta, x, stage.signed(vector), gradient_too=gradient_too
            )
        if slope is None:
            return None, mixed
        if all(t is None for t in slope):
            raise unreached(stage.title)
        return stage.stationarity(slope, theta), mixed


class _GraphSpan:
    """The span of an evaluation, which may be evaluated again for a checkpoint during each reverse pass.

    Gradients are on while the graph is made, and not for the solve that takes its time in between: a generator, which
    would leave them on, makes small solves take a thirtieth longer.
    """

    __slots__ = ("_evaluation", "_stage", "_theta", "_x")

    def __init__(self, stage: StageFunction, theta: Vector, x: Vector) -> None:
        self._stage, self._theta, self._x = stage, theta, x
        self._evaluation = stage.evaluation(theta, x)

    def __enter__(self) -> Linearisation:
        with torch.enable_grad():  # for the responses that the loss reads, too
            evaluate = self._evaluation.__enter__()
            try:
                return _RetainedGraph(self._stage, evaluate, self._theta, self._x)
            except BaseException as error:
                self._evaluation.__exit__(type(error), error, error.__traceback__)
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._evaluation.__exit__(kind, error, trace)


class _RetainedGraph(Linearisation):
    def __init__(self, stage: StageFunction, evaluate: Callable[[], Tensor], theta: Vector, x: Vector) -> None:
        self.gradient = stage.gradient(evaluate(), theta)
        self._theta, self._x = self.taking_part(theta), x
        self._g = self.taking_part(self.gradient)
        self._constant = not all(t.requires_grad for t in self._g)
        self._probe: tuple[Vector, Vector] | None = None

    def product(self, vector: Sequence[Tensor]) -> Vector:
        if self._constant:
            return filled(gradients(self._g, self._theta, tuple(vector), retain_graph=True), self._theta)
        # As `gradients`, without its search for holes, which would be made anew for every product.
        found = reverse_pass(self._g, self._theta, tuple(vector), retain_graph=True)
        return tuple(
            [
                torch.zeros_like(theta) if t is None else t.to_dense() if t.is_sparse else t
                for t, theta in zip(found, self._theta, strict=True)
            ]
        )

    def transposed_product(self, vector: Sequence[Tensor]) -> Vector:
        if self._probe is None:
            # H·v is the derivative of Hᵀ·w in w, which is linear: any w will do.
            w = tuple(torch.zeros_like(t, requires_grad=True) for t in self._theta)
            with torch.enable_grad():
                linear = gradients(self._g, self._theta, w, create_graph=True, retain_graph=True)
            self._probe = w, filled(linear, self._theta)
        w, transposed = self._probe
        return filled(gradients(transposed, w, tuple(vector), retain_graph=True), self._theta)

    def mixed_product(self, vector: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return gradients(self._g, self._x, tuple(vector))

    def both_products(self, vector: Sequence[Tensor]) -> tuple[Vector, tuple[Tensor | None, ...]]:
        found = gradients(self._g, (*self._theta, *self._x), tuple(vector))
        return filled(found[: len(self._theta)], self._theta), found[len(self._theta) :]
