"""BOAT: its numerical approximation operators after one inner step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mlo.bench.libraries.peer import PatchedView, Peer, TwoLevels, load
from mlo.bench.specification import SHIFT, Method
from mlo.bench.stage import Case, Gradient

_OPERATORS = {"fd": "FD", "identity": "NS", "neumann": "NS", "cg": "CG", "unroll": "RAD"}


def lower_loss(feed: Any, upper: nn.Module, lower: nn.Module, **_: Any) -> Tensor:
    """Evaluate the lower loss; BOAT finds it by its name. The parameters that it passes are those of `lower`."""
    two: TwoLevels = feed["two"]
    return two.loss_of(two.lower, PatchedView(lower, two.names), two.upper_view(list(upper.parameters())))


def upper_loss(feed: Any, upper: nn.Module, lower: nn.Module, **_: Any) -> Tensor:
    """Evaluate the upper loss; BOAT finds it by its name. The parameters that it passes are those of `lower`."""
    two: TwoLevels = feed["two"]
    return two.loss_of(two.upper, two.upper_view(list(upper.parameters())), PatchedView(lower, two.names))


class Boat(Peer):
    """`boat_torch.Problem.run_iter`, which returns the gradients instead of stepping.

    BOAT always takes an inner step first; for the implicit methods it is of length 0, so that all libraries stand at
    the same weights. Each call also evaluates both losses once more, for BOAT's log (written to nowhere).
    """

    name = "boat"
    module = "boat_torch"
    distribution = "boat-torch"
    install = "pip install --no-deps boat-torch"
    kinds = tuple(_OPERATORS)

    #: At which length of the residual (of the change, for "neumann") BOAT stops. Its default of 1e-10 makes its
    #: conjugate gradients return the iterate before the one that converged.
    tolerance: ClassVar[float] = 0.0

    def refuses(self, case: Case, method: Method) -> str | None:
        """Return what it lacks."""
        if method.kind == "unroll" and len(case.stages[0].batches) > 1:
            return "boat takes all its inner steps on one batch"
        return super().refuses(case, method)

    def hypergradient(self, case: Case, method: Method) -> Callable[[], Gradient]:
        """Return BOAT's iteration."""
        two = TwoLevels(case)
        unrolled = method.kind == "unroll"
        module = two.lower.beginning() if unrolled else two.lower.module()
        chosen, own = list(two.above.parameters()), list(module.parameters())
        # What its operators take for the learning rate is the default, what its steps take is that of the group.
        group = {"params": own, "lr": two.lower.factor if unrolled else 0.0}
        terms = (method.budget or 1) - (method.kind != "cg")  # the first term is not counted
        config = {
            "fo_op": None,
            "gm_op": ["NGD"],
            "na_op": [_OPERATORS[method.kind]],
            "lower_level_model": module,
            "upper_level_model": two.above,
            "lower_level_var": own,
            "upper_level_var": chosen,
            "lower_level_opt": torch.optim.SGD([group], lr=two.lower.factor),
            "upper_level_opt": torch.optim.SGD(chosen, lr=0.0),
            "lower_iters": (method.budget or 1) if unrolled else 1,
            "device": str(chosen[0].device),
            "CG": {"k": terms, "tolerance": self.tolerance},
            "FD": {"r": SHIFT},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0},
            "RGT": {"truncate_iter": 0},
            "accumulate_grad": False,
            "copy_last_param": False,
            "return_grad": True,
            "loss_log_path": os.devnull,
        }
        losses = {
            "lower_level_loss": {"function": f"{__name__}.lower_loss"},
            "upper_level_loss": {"function": f"{__name__}.upper_loss"},
        }
        problem = load("boat_torch").Problem(config, losses)
        problem.build_ll_solver()
        problem.build_ul_solver()
        feed = {"two": two}

        def computed() -> Gradient:
            for p in chosen:
                p.grad = None
            problem.loss_history.clear()  # it is written out whole each time
            gradients, _ = problem.run_iter(feed, feed, 0)
            return two.named(gradients)

        return computed
