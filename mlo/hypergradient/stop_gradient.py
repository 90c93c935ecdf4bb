"""No gradient through a stage at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mlo.hypergradient.base import HypergradientMethod
from mlo.stage_function import StageFunction


@dataclass(frozen=True)
class StopGradient(HypergradientMethod):
    """c ↦ 0: the solution is taken as a constant (first-order methods, alternating minimisation).

    Only the direct gradient of the upper loss is left. Costs nothing.

    >>> import mlo, torch
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> w = mlo.best_response(lambda w, x: (w - x) ** 2, torch.tensor(3.0), x, mlo.StopGradient())
    >>> torch.autograd.grad(w * x, x)[0].item()           # the direct part alone
    3.0

    """

    carries_gradient: ClassVar[bool] = False

    def pullback(
        self,
        stage: StageFunction,
        cotangents: Sequence[Tensor],
        solution: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> tuple[None, ...]:
        """Return nothing for each of the inputs."""
        return (None,) * len(inputs)
