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

    Only the direct gradient of the upper loss is left: ∂F/∂x instead of dF/dx. Right where c = 0 or the solution does
    not depend on x; nothing has to converge.

    Cost: no product, no pass, no memory.

    Source: first-order MAML (Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of deep
    networks", ICML 2017, section 5.2); first-order DARTS (Liu, Simonyan and Yang, ICLR 2019, section 2.3).

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
