"""Products by forward mode over reverse mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mlo.products.base import Linearisation, Product
from mlo.products.directional import DirectionalLinearisation
from mlo.reverse_pass import gradients
from mlo.stage_function import StageFunction, leaves
from mlo.vectors import Vector


@dataclass(frozen=True)
class ForwardOverReverse(Product):
    """Hᵀv = ∂/∂ε ∂L/∂θ(θ + εv) at ε = 0, and Gᵀv likewise with ∂L/∂x: dual numbers through both passes.

    Exact to rounding where ∂²L/∂θ² is symmetric, as it is for every loss without a stop-gradient inside: it is H·v
    that forward mode forms.

    Cost: one forward and one reverse pass to set up, and for each product both again with tangents, at about twice the
    cost. No graph stays: the memory is that of one training step with tangents.

    Needs forward-mode derivatives of every operation in the loss and in its gradient; has no derivative of its own.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994.

    >>> import mlo, torch
    >>> x = torch.tensor(3.0, requires_grad=True)         # w*(x) = x / 2
    >>> method = mlo.ConjugateGradient(product=mlo.ForwardOverReverse())
    >>> w = mlo.best_response(lambda w, x: w**2 - w * x, torch.tensor(1.5), x, method)
    >>> torch.autograd.grad(w, x)[0].item()
    0.5

    """

    @contextmanager
    def linearised(
        self,
        stage: StageFunction,
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        known: Sequence[Tensor | None] | None = None,
    ) -> Iterator[Linearisation]:
        """Evaluate the gradient once if it is not known, to find what takes part."""
        yield _Tangents(stage, solution, inputs, needed, known)


class _Tangents(DirectionalLinearisation):
    def derivative(self, direction: Vector, *, in_theta: bool) -> tuple[Tensor | None, ...]:
        with forward_ad.dual_level(), torch.enable_grad():
            dual = tuple(
                forward_ad.make_dual(t, d.detach())  # type: ignore[no-untyped-call]
                for t, d in zip(leaves(self.solution), direction, strict=True)
            )
            x = leaves(self.inputs, False if in_theta else self.needed)
            with self.stage.evaluation(dual, x) as evaluate:
                found = gradients((evaluate(),), dual if in_theta else x)
                return tuple(_tangent(t) for t in found)


def _tangent(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    primal, tangent = forward_ad.unpack_dual(gradient)  # type: ignore[no-untyped-call]
    # A gradient that does not change along the direction has no tangent.
    return torch.zeros_like(primal) if tangent is None else tangent.detach()
