"""Stages whose modules are compiled: the engine binds tensors in their parameter slots as in those of eager ones.

The backend is the one that captures graphs and runs them eagerly: what could go wrong is the capture (parameters taken
for constants, buffers written past the engine), not the code that a compiler makes of it.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlo

X, Y = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


class Weighted(mlo.Problem):
    def training_step(self, batch):
        x, y = batch
        losses = F.cross_entropy(self(x), y, reduction="none")
        return (self.deps.weights(losses.detach()[:, None]).squeeze(1) * losses).mean()


class Validation(mlo.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.deps.network(x), y)


def engine_of(compiled, method):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    weights = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
    network.to(torch.float64), weights.to(torch.float64)
    run = (lambda m: torch.compile(m, backend="aot_eager")) if compiled else (lambda m: m)
    lower = Weighted(
        "network",
        run(network),
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        data=[(X.double(), Y), (X.double() + 1, Y)],
        depends_on=["weights"],
        hypergradient=method,
    )
    upper = Validation(
        "weights",
        run(weights),
        optimizer=torch.optim.Adam(weights.parameters(), lr=0.01),
        data=[(X.double() - 1, Y)],
        depends_on=["network"],
    )
    return mlo.Engine([lower, upper]), network, weights


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_modules_train_to_the_same_weights_and_buffers():
    found = []
    for compiled in (False, True):
        engine, *modules = engine_of(compiled, mlo.FiniteDifference())
        engine.run(6)
        found.append([t.clone() for m in modules for t in m.state_dict().values()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_modules_are_compiled_a_fixed_number_of_times():
    engine, *_ = engine_of(True, mlo.FiniteDifference())
    engine.run(4)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    engine.run(8)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_module_has_no_second_derivative():
    """Torch says so; the error names the way out."""
    engine, *_ = engine_of(True, mlo.ConjugateGradient(max_steps=3))
    with pytest.raises(mlo.EvaluationError, match="FiniteDifference"):
        engine.step()
