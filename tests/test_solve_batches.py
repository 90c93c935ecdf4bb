"""The batches that a hypergradient takes the Hessian of a stage from."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import mlo


class Mean(mlo.Problem):
    """Mean over the batch of ½·h·(w − top·t)²: H is the mean of h, the mixed product that of h·t."""

    def training_step(self, batch):
        h, t = batch
        gap = self.params["w"] - t * self.deps.top.params["w"]
        return (0.5 * h * gap.square()).mean()


class Top(mlo.Problem):
    def training_step(self, batch):
        return self.deps.low.params["w"].sum()


def holder():
    return nn.ParameterDict({"w": torch.ones(1)})


def build(data, **options):
    low, top = holder(), holder()
    return mlo.Engine(
        [
            Mean(
                "low",
                low,
                optimizer=torch.optim.SGD(low.parameters(), lr=0.0),
                data=data,
                depends_on=["top"],
                hypergradient=mlo.Dense(),
                **options,
            ),
            Top("top", top, optimizer=torch.optim.SGD(top.parameters(), lr=0.0), depends_on=["low"]),
        ]
    )


def exact(batches):
    """Mean of h·t over mean of h, where each batch has the same weight."""
    h = torch.stack([h.mean() for h, _ in batches]).mean()
    return (torch.stack([(h * t).mean() for h, t in batches]).mean() / h).item()


def batch():
    return torch.rand(4) + 0.5, torch.randn(4)


def gradient(engine):
    engine.step()
    return engine.problems["top"].module["w"].grad.item()


def test_the_last_batch_is_the_default():
    data = [batch() for _ in range(3)]
    engine = build(data)
    for k in (0, 1, 2, 0):
        assert gradient(engine) == pytest.approx(exact([data[k]]), rel=1e-12)
        assert engine.hypergradient("top")["w"].item() == pytest.approx(exact([data[k]]), rel=1e-12)


def test_further_batches_come_from_the_data_in_turn():
    data = [batch() for _ in range(6)]
    engine = build(data, solve_batches=2)
    assert engine.hypergradient("top")["w"].item() == pytest.approx(exact(data[:2]), rel=1e-12), "a preview"
    assert gradient(engine) == pytest.approx(exact(data[1:3]), rel=1e-12), "the first one was for the step"
    assert gradient(engine) == pytest.approx(exact(data[4:6]), rel=1e-12)
    assert engine.hypergradient("top")["w"].item() == pytest.approx(exact(data[4:6]), rel=1e-12), "the last ones"


@pytest.mark.parametrize("make", [list, tuple, lambda data: DataLoader(data, batch_size=None)])
def test_a_preview_begins_with_the_first_batch_again_where_there_are_too_few(make):
    data = [batch() for _ in range(2)]
    engine = build(make(data), solve_batches=3)
    assert engine.hypergradient("top")["w"].item() == pytest.approx(exact([*data, data[0]]), rel=1e-12)
    assert gradient(engine) == pytest.approx(exact([data[1], data[0], data[1]]), rel=1e-12), "nothing was drawn"


@pytest.mark.parametrize("count", [None, 3])
def test_a_stream_of_its_own(count):
    data, own = [batch() for _ in range(2)], [batch() for _ in range(6)]
    engine = build(data, solve_data=own, solve_batches=count)
    n = count or 1
    assert engine.hypergradient("top")["w"].item() == pytest.approx(exact(own[:n]), rel=1e-12)
    assert gradient(engine) == pytest.approx(exact(own[:n]), rel=1e-12)
    assert gradient(engine) == pytest.approx(exact(own[n : 2 * n]), rel=1e-12)


def test_the_whole_data_gives_the_full_hessian_with_accumulation_too():
    data = [batch() for _ in range(4)]
    assert gradient(build(data, solve_data=data, solve_batches=4)) == pytest.approx(exact(data), rel=1e-12)
    assert gradient(build(data, accumulate=4)) == pytest.approx(exact(data), rel=1e-12)


def test_options_are_checked():
    with pytest.raises(mlo.ConfigurationError, match="'low', solve_batches: expected an integer of at least 1"):
        build([batch()], solve_batches=0)
    with pytest.raises(mlo.ConfigurationError, match="'low', solve_data: expected at least one batch"):
        build([batch()], solve_data=[])
