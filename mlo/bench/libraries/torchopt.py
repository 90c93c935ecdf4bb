"""TorchOpt: implicit differentiation by `custom_root`, unrolling by `MetaSGD`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlo.bench.libraries.peer import PatchedView, Peer, TwoLevels, load, quietly
from mlo.bench.specification import Method
from mlo.bench.stage import Case, Gradient


class TorchOpt(Peer):
    """`torchopt.diff.implicit.custom_root` with its linear solvers.

    Its conjugate gradients make one product more than steps, for the residual of zero. Its "dense" is right for a
    stage of one tensor only: `materialize_matvec` keeps the diagonal blocks of the Hessian.
    """

    name = "torchopt"
    module = "torchopt"
    distribution = "torchopt"
    install = "pip install torchopt"
    kinds = ("identity", "neumann", "cg", "dense", "unroll")

    def hypergradient(self, case: Case, method: Method) -> Callable[[], Gradient]:
        """Return the derivative of the upper loss through a root at the stage's weights."""
        if method.kind == "unroll":
            return self._unrolled(case, method.budget or 1)
        two = TwoLevels(case, without_statistics=True)
        optimality = torch.func.grad(two.lower_loss)

        def solution(_initial: Any, _x: Any) -> tuple[Tensor, ...]:
            return two.weights

        def stationary(w: Any, x: Any) -> Any:
            return optimality(w, x)

        implicit = load("torchopt.diff.implicit")
        root = implicit.custom_root(stationary, argnums=1, solve=self._solver(method, two.lower.factor))(solution)

        def computed() -> Gradient:
            with quietly():
                return two.gradient(two.upper_loss(root(two.weights, two.choice), two.choice))

        return computed

    @staticmethod
    def _solver(method: Method, factor: float) -> Any:
        linear_solve = load("torchopt.linear_solve")
        budget = method.budget or 1
        if method.kind == "cg":
            return linear_solve.solve_cg(maxiter=budget, rtol=0.0, atol=0.0)
        if method.kind == "dense":
            return linear_solve.solve_inv()
        return linear_solve.solve_inv(ns=True, maxiter=budget - 1, alpha=factor)  # the first term is not counted

    @staticmethod
    def _unrolled(case: Case, steps: int) -> Callable[[], Gradient]:
        torchopt = load("torchopt")
        two = TwoLevels(case)
        module = two.lower.beginning()
        view, above = PatchedView(module, two.names), two.upper_view(two.choice)
        beginning = torchopt.extract_state_dict(module, by="reference")

        def computed() -> Gradient:
            with quietly():
                torchopt.recover_state_dict(module, beginning)
                optimizer = torchopt.MetaSGD(module, lr=two.lower.factor)
                for step in range(steps):
                    optimizer.step(two.loss_of(two.lower, view, above, step))
                return two.gradient(two.loss_of(two.upper, above, view))

        return computed
