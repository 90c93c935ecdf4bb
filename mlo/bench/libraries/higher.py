"""higher: unrolling by patched modules and differentiable optimizers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mlo.bench.libraries.peer import PatchedView, Peer, TwoLevels, load
from mlo.bench.specification import Method
from mlo.bench.stage import Case, Gradient


class Higher(Peer):
    """`higher.innerloop_ctx`. It has no implicit differentiation."""

    name = "higher"
    module = "higher"
    distribution = "higher"
    install = "pip install higher"
    kinds = ("unroll",)

    def hypergradient(self, case: Case, method: Method) -> Callable[[], Gradient]:
        """Return the derivative through gradient descent."""
        higher = load("higher")
        two = TwoLevels(case)
        module, above = two.lower.beginning(), two.upper_view(two.choice)
        optimizer = torch.optim.SGD(module.parameters(), lr=two.lower.factor)

        def computed() -> Gradient:
            with higher.innerloop_ctx(module, optimizer) as (patched, differentiable):
                view = PatchedView(patched, two.names)
                for step in range(method.budget or 1):
                    differentiable.step(two.loss_of(two.lower, view, above, step))
                return two.gradient(two.loss_of(two.upper, above, view))

        return computed
