"""Problems whose losses are functions, and methods that are exact where the Hessian is twice the identity."""

import torch
from torch import nn

import mlo

METHODS = [
    mlo.ConjugateGradient(),
    mlo.Dense(),
    mlo.Neumann(terms=200, scale=0.5),
    mlo.Identity(scale=0.5),
    mlo.FiniteDifference(scale=0.5),
]


class Problem(mlo.Problem):
    """A problem whose loss is a function of itself and its batch."""

    def __init__(self, name, module, loss, lr=0.1, momentum=0.0, **options):
        self.loss = loss
        options.setdefault("optimizer", torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum))
        super().__init__(name, module, **options)

    def training_step(self, batch):
        return self.loss(self, batch)


class Holder(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


def pull(p, _):
    """½‖w − top‖², whose response follows top at rate 1."""
    return 0.5 * (p.params["w"] - p.deps.top.params["w"]).square().sum()


def two_levels(low_loss=pull, top_loss=None, *, low=None, method=None, data=None, top=None, **options):
    """A lower problem `low`, an upper one `top`, and their engine."""
    if top_loss is None:
        top_loss = lambda p, _: 0.5 * p.deps.low.params["w"].square().sum()
    lower = Problem(
        "low", low or Holder(1.0, 2.0), low_loss, depends_on=["top"], hypergradient=method, data=data, **options
    )
    upper = Problem("top", top or Holder(1.0, 2.0), top_loss, depends_on=["low"])
    return mlo.Engine([lower, upper])
