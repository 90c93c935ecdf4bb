"""`engine.hypergradient` changes nothing, and all products of one solve see one function."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import mlo
from mlo import random_state

BATCHES = 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, 16), nn.Tanh()
        )
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.body(x))


class Stage(mlo.Problem):
    def training_step(self, batch):
        x, y = batch
        weight = torch.sigmoid(self.deps.upper.params["weight"])
        noise = random.random() + np.random.rand() if self.host_noise else 0.0
        fit = (weight * (self(x) - y).square().mean(0)).sum() * (1 + noise)
        return fit + (F.softplus(self.deps.upper.params["decay"]) * mlo.squared_distance(self.params, self.start))

    host_noise = False


class Upper(mlo.Problem):
    def training_step(self, batch):
        x, y = batch
        return (self.deps.stage(x) - y).square().mean() + F.dropout(self.params["weight"], 0.5).square().sum()


def data(seed, shuffle=True, **options):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * BATCHES, 4, generator=g)
    y = x.sum(1, keepdim=True).sin() + 0.1 * torch.randn(8 * BATCHES, 1, generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=shuffle, **options)


def build(method=None, *, stage_data=None, host_noise=False):
    torch.manual_seed(3)
    net = Net()
    stage = Stage(
        "stage",
        net,
        optimizer=torch.optim.Adam(net.parameters(), lr=0.01),
        data=stage_data or data(1),
        depends_on={"upper": "weights"},
        hypergradient=method or mlo.FiniteDifference(),
        steps=2,
    )
    stage.host_noise = host_noise
    stage.start = {n: p.detach().clone() for n, p in net.named_parameters()}
    weights = nn.ParameterDict({"weight": torch.randn(1), "decay": torch.tensor(-3.0)})
    upper = Upper(
        "weights",
        weights,
        optimizer=torch.optim.Adam(weights.parameters(), lr=0.01),
        data=data(2),
        depends_on=["stage"],
    )
    return mlo.Engine([stage, upper])


def snapshot(engine):
    """Everything that a hypergradient must leave alone, as plain bytes and numbers."""
    state = {}
    for name, p in engine.problems.items():
        state[name] = {
            "module": {k: v.clone() for k, v in p.module.state_dict().items()},
            "identity": [id(t) for t in (*p.module.parameters(), *p.module.buffers())],
            "requires_grad": [t.requires_grad for t in p.module.parameters()],
            "grad": [None if t.grad is None else t.grad.clone() for t in p.module.parameters()],
            "optimizer": copy.deepcopy(p.optimizer.state_dict()),
            "modes": [m.training for m in p.module.modules()],
        }
    state["random"] = (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False))
    return state


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


METHODS = [
    mlo.FiniteDifference(),
    mlo.ConjugateGradient(max_steps=3, damping=5.0),
    mlo.Neumann(3),
    mlo.Identity(),
    mlo.StopGradient(),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("train", [True, False])
def test_hypergradient_changes_nothing(method, steps_before, train):
    engine = build(method, host_noise=True)
    engine.problems["stage"].module.body[3].train(train)
    for _ in range(steps_before):
        engine.step()
    before = snapshot(engine)
    first = engine.hypergradient("weights")
    engine.hypergradient("stage")
    assert_same(before, snapshot(engine))
    assert_same(first, engine.hypergradient("weights"))
    assert engine.problems["stage"]._frame is None


def test_the_normal_number_that_numpy_keeps_is_there_after_a_hypergradient():
    """It is drawn without a change of the words; here by the one problem whose gradient is asked for."""

    class Noisy(mlo.Problem):
        def training_step(self, batch):
            return (self.params["w"] * np.random.randn()).sum()

    module = nn.ParameterDict({"w": torch.ones(2)})
    engine = mlo.Engine([Noisy("noisy", module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))])
    np.random.seed(0)
    np.random.randn()
    before = np.random.get_state(legacy=False)
    assert before["has_gauss"]
    kept = before["gauss"]
    for _ in range(2):
        assert engine.hypergradient("noisy")["w"].tolist() == pytest.approx([kept, kept])
        assert_same(before, np.random.get_state(legacy=False))


@pytest.mark.parametrize("own_generator", ["none", "loader", "sampler", "batch sampler"])
def test_hypergradients_leave_the_course_of_training_alone(own_generator):
    """Two runs, one of which asks for hypergradients at every moment, end at the same bits."""

    def loader():
        plain = data(1)
        g = torch.Generator().manual_seed(7)
        if own_generator == "none":
            return plain
        if own_generator == "loader":
            return data(1, generator=g)
        sampler = RandomSampler(plain.dataset, generator=g)
        if own_generator == "sampler":
            return DataLoader(plain.dataset, batch_size=8, sampler=sampler)
        return DataLoader(plain.dataset, batch_sampler=torch.utils.data.BatchSampler(sampler, 8, drop_last=False))

    ends = []
    for curious in (False, True):
        engine = build(stage_data=loader())
        torch.manual_seed(11)
        for _ in range(BATCHES):
            if curious:
                engine.hypergradient("weights")
            engine.step()
        ends.append(snapshot(engine))
    for end in ends:
        for name in ("stage", "weights"):
            del end[name]["identity"]
    assert_same(*ends)


def test_before_the_first_step_the_first_batch_of_a_fresh_run_is_used():
    engine = build(stage_data=data(1, shuffle=False))
    seen = []
    stage = engine.problems["stage"]
    step = stage.training_step
    stage.training_step = lambda batch: seen.append(batch) or step(batch)
    engine.hypergradient("weights")
    engine.step()
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][0], next(iter(stage.data))[0])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_finite_differences_and_double_backward_see_the_same_masks(accumulate):
    """With dropout and batch normalisation the two products agree, before and after steps."""
    found = {}
    for method in (mlo.FiniteDifference(scale=0.1), mlo.Identity(scale=0.1)):
        engine = build(method)
        engine.problems["stage"].accumulate = accumulate
        gradients = []
        for _ in range(3):
            h = engine.hypergradient("weights")
            gradients.append(torch.cat([v.reshape(-1) for v in h.values()]))
            engine.problems["weights"].optimizer.param_groups[0]["lr"] = 0.0  # both see the same weights
            engine.step()
        found[type(method)] = gradients
    for a, b in zip(*found.values(), strict=True):
        assert F.cosine_similarity(a, b, dim=0) > 0.9999
        assert (a - b).norm() / b.norm() < 1e-4


def test_host_generators_are_replayed_too():
    found = []
    for method in (mlo.FiniteDifference(scale=0.1), mlo.Identity(scale=0.1)):
        random.seed(0)
        np.random.seed(0)
        engine = build(method, host_noise=True)
        engine.problems["weights"].optimizer.param_groups[0]["lr"] = 0.0
        engine.step()
        found.append(torch.cat([v.reshape(-1) for v in engine.hypergradient("weights").values()]))
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-4


def test_host_generators_are_noticed_when_their_use_begins_late():
    engine = build(host_noise=False)
    stage = engine.problems["stage"]
    for _ in range(3):
        engine.step()
    assert not engine._members["stage"].host_draws.found
    stage.host_noise = True
    for _ in range(16):
        engine.step()
    assert engine._members["stage"].host_draws.found


def test_a_step_updates_buffers_as_a_hand_written_loop_and_methods_update_none():
    engine = build(mlo.ConjugateGradient(max_steps=4, damping=5.0))
    norm = engine.problems["stage"].module.body[1]
    engine.step()
    # Two steps of the stage, one forward pass of the upper loss.
    assert norm.num_batches_tracked.item() == 3


def test_the_function_of_a_solve_is_that_of_the_last_step():
    """The stage's last batch and masks: moving the loader on or drawing numbers changes nothing."""
    engine = build()
    engine.step()
    first = engine.hypergradient("weights")
    torch.manual_seed(99)
    torch.rand(5)
    assert_same(first, engine.hypergradient("weights"))


@pytest.mark.parametrize("known", [True, False])
def test_the_words_of_python_s_generator_are_its_state(known, monkeypatch):
    """What is read from where they lie can be put back: the same numbers follow, a kept normal one too."""
    if known:
        assert random_state._PYTHON_WORDS is not None
    else:
        monkeypatch.setattr(random_state, "_PYTHON_WORDS", None)
        monkeypatch.setattr(random_state, "_GENERATORS", random_state._Generators())
    HostState = random_state.HostState

    random.seed(3)
    np.random.seed(3)
    random.gauss(0.0, 1.0)
    np.random.randn(3)  # each of the two keeps a second normal number now

    def drawn():
        return [random.gauss(0.0, 1.0), random.random(), np.random.randn(), np.random.rand()]

    before = HostState.capture()
    numbers = drawn()
    assert not before.unmoved()
    before.restore()
    assert before.unmoved()
    assert drawn() == numbers
    light = HostState.capture(whole=False)
    numbers = [random.random(), np.random.rand()]
    light.restore()
    assert [random.random(), np.random.rand()] == numbers


@pytest.mark.parametrize("count", [1, 2, 312, 623, 624, 625, 1248])
@pytest.mark.parametrize(
    "draw", [lambda n: [random.getrandbits(32) for _ in range(n)], lambda n: np.random.randint(0, 2**32, n, np.uint32)]
)
def test_any_number_of_draws_is_noticed(draw, count):
    """The words are renewed every 624 of them, when the position in them is the same again."""
    before = random_state.HostState.capture(whole=False)
    assert before.unmoved()
    first = list(draw(count))
    assert not before.unmoved()
    before.restore()
    assert before.unmoved()
    assert list(draw(count)) == first


def test_states_that_nothing_was_drawn_from_are_copied_once():
    before = random_state.HostState.capture(whole=False)
    assert random_state.HostState.capture(whole=False) is before
    random.random()
    assert random_state.HostState.capture(whole=False) is not before


class Counting(nn.Module):
    """Its output grows with each forward pass that it has made."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0.0, dtype=torch.float64))

    def forward(self):
        self.calls += 1
        return self.weight * (1 + self.calls)


class Growing(mlo.Problem):
    def training_step(self, batch):
        return 0.5 * (self() - self.deps.top.params["x"]) ** 2


class Top(mlo.Problem):
    def training_step(self, batch):
        return self.deps.low.params["weight"] + 0 * self.params["x"]


@pytest.mark.parametrize(
    "method", [mlo.FiniteDifference(scale=1.0), mlo.Identity(scale=1.0, product=mlo.CentralDifferences())]
)
def test_both_sides_of_a_difference_begin_with_the_same_buffers(method):
    """At two in each evaluation: L = ½(2w − x)², and −∂²L/∂w∂x is 2."""
    top = nn.ParameterDict({"x": nn.Parameter(torch.tensor(1.0, dtype=torch.float64))})
    low = Counting()
    engine = mlo.Engine(
        [Growing("low", low, depends_on=["top"], hypergradient=method), Top("top", top, depends_on=["low"])]
    )
    assert engine.hypergradient("top")["x"].item() == pytest.approx(2.0, rel=1e-8)
    assert low.calls == 0


@pytest.mark.parametrize(
    "method",
    [
        mlo.FiniteDifference(scale=1.0),
        mlo.Identity(scale=1.0),
        mlo.Identity(scale=1.0, product=mlo.CentralDifferences()),
    ],
)
def test_buffers_that_two_problems_share_are_put_back(method):
    """A frozen part in both modules: the second one's copies are copies of the first one's."""
    shared = nn.BatchNorm1d(3, affine=False)
    low, top = nn.Sequential(shared, nn.Linear(3, 1)), nn.Sequential(shared, nn.Linear(3, 1))
    x = torch.randn(5, 3)

    class Low(mlo.Problem):
        def training_step(self, batch):
            return (self(x) - self.deps.top(x)).square().mean() + self.params["1.weight"].square().sum()

    class High(mlo.Problem):
        def training_step(self, batch):
            return (self.deps.low(x) - self(x) + 1).square().mean()

    engine = mlo.Engine(
        [Low("low", low, depends_on=["top"], hypergradient=method), High("top", top, depends_on=["low"])]
    )
    buffers = dict(shared.named_buffers())
    values = {name: b.clone() for name, b in buffers.items()}
    engine.hypergradient("top")
    for name, b in shared.named_buffers():
        assert b is buffers[name]
        assert torch.equal(b, values[name])
