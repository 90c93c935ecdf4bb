"""Exceptions in user code, in-place operations, activation checkpointing, and modules used in unusual ways."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mlo
from tests import zoo


class Surprise(Exception):
    """An error of the user's own kind, with arguments that could not be rebuilt."""

    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code


METHODS = [
    mlo.FiniteDifference(),
    mlo.ConjugateGradient(),
    mlo.Neumann(3, 0.1),
    mlo.Identity(),
    mlo.Dense(),
]


def failing_at(problem, call):
    """Let the loss of `problem` raise in its `call`-th evaluation from here on."""
    step, count = problem.training_step, [0]

    def failing(batch):
        count[0] += 1
        loss = step(batch)
        if count[0] == call:
            raise Surprise(7, "in the loss")
        return loss

    problem.training_step = failing
    return count


def state(engine):
    return {
        name: (
            [p.detach().clone() for p in problem.module.parameters()],
            [id(p) for p in problem.module.parameters()],
            [None if p.grad is None else p.grad.clone() for p in problem.module.parameters()],
            copy.deepcopy(problem.optimizer.state_dict()["state"]),
        )
        for name, problem in engine.problems.items()
    }


def assert_same(a, b):
    for name in a:
        for x, y in zip(a[name][0], b[name][0], strict=True):
            assert torch.equal(x, y), name
        assert a[name][1] == b[name][1]
        for x, y in zip(a[name][2], b[name][2], strict=True):
            assert (x is None and y is None) or torch.equal(x, y)
        assert str(a[name][3]) == str(b[name][3])


def note_steps(engine, marks):
    """Note the state after each optimizer step."""
    for name, problem in engine.problems.items():
        problem.optimizer.register_step_post_hook(lambda *_, name=name: marks.append((name, state(engine))))


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_at_any_point_leaves_everything_as_it_was(method):
    """The evaluation of w2 fails that belongs to: its own step, its node, the second of two shifted ones."""
    evaluations = 3 if isinstance(method, mlo.FiniteDifference) else 2
    for call in range(1, evaluations + 1):
        stages, top = zoo.chain(method, length=2)
        for p in (*stages, top):
            p.optimizer = torch.optim.SGD(p.module.parameters(), lr=0.1, momentum=0.9)
        engine = mlo.Engine([*stages, top])
        engine.step()
        marks = [("before", state(engine))]
        note_steps(engine, marks)
        failing_at(stages[1], call)
        with pytest.raises(Surprise) as caught:
            engine.step()
        assert caught.value.code == 7
        assert_same(marks[-1][1], state(engine))  # as the last optimizer step left it
        assert [name for name, _ in marks] == ["before", "w1", *(["w2"] if call > 1 else [])]
        assert all(p._frame is None for p in engine.problems.values())
        engine.step()  # and the engine goes on
        assert [name for name, _ in marks][-3:] == ["w1", "w2", "top"]


def test_an_exception_in_the_upper_loss():
    stages, top = zoo.two_levels(mlo.ConjugateGradient())
    engine = mlo.Engine([*stages, top])
    before = state(engine)["top"]
    failing_at(top, 1)
    with pytest.raises(Surprise):
        engine.step()
    assert_same({"top": before}, {"top": state(engine)["top"]})


def test_an_exception_in_a_nested_evaluation():
    from tests.test_hypergradient_nested import non_quadratic_levels

    total = 0
    for call in range(1, 40):
        levels = non_quadratic_levels(3, mlo.ConjugateGradient())
        engine = mlo.Engine(levels)
        before, random = state(engine), torch.get_rng_state()
        count = failing_at(levels[0], call)
        try:
            engine.hypergradient("t1")
        except Surprise:
            total += 1
        else:
            assert count[0] < call
            break
        assert_same(before, state(engine))
        assert all(p._frame is None for p in engine.problems.values())
        assert torch.equal(random, torch.get_rng_state())
    assert total > 15


def test_an_exception_in_the_middle_of_an_lbfgs_step():
    stages, top = zoo.two_levels(mlo.ConjugateGradient())
    stages[0].optimizer = torch.optim.LBFGS(stages[0].module.parameters(), lr=0.5, max_iter=4)
    engine = mlo.Engine([*stages, top])
    engine.step()
    before = state(engine)
    failing_at(stages[0], 3)
    with pytest.raises(Surprise):
        engine.step()
    assert_same(before, state(engine))


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: t.add_(1),
        lambda t: t.__setitem__(0, 5.0),
        lambda t: t.view(-1).mul_(2),
        lambda t: t.detach().add_(1),
        torch.no_grad()(lambda t: t.zero_()),
    ],
)
@pytest.mark.parametrize("which", ["response", "constant", "own"])
def test_in_place_operations_on_parameters_are_errors(operation, which):
    class Careless(zoo.Target):
        def training_step(self, batch):
            if which != "constant":
                params = self.params if which == "own" else self.deps["w"].params
                operation(params["rest"])
            return super().training_step(batch)

    class CarelessStage(zoo.Quadratic):
        def training_step(self, batch):
            if which == "constant":
                operation(self.deps["top"].params["rest"])
            return super().training_step(batch)

    top = Careless(reads=["w"])
    engine = mlo.Engine([CarelessStage("w", reads=["top"]), top])
    with pytest.raises(RuntimeError, match=r"in.?place"):
        engine.step()
    with pytest.raises(RuntimeError, match=r"in.?place"):
        engine.hypergradient("top")


def test_in_place_operations_in_grad_mode_do_not_reach_the_parameter():
    class Careless(zoo.Target):
        def training_step(self, batch):
            self.deps["w"].params["rest"].add_(1)
            return super().training_step(batch)

    top = Careless(reads=["w"])
    stage = zoo.Quadratic("w", reads=["top"])
    engine = mlo.Engine([stage, top])
    before = stage.module.rest.detach().clone()
    with pytest.raises(RuntimeError, match="in-place"):
        engine.hypergradient("top")
    assert torch.equal(before, stage.module.rest)


# --- activation checkpointing ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 1)
        self.style = style

    def hidden(self, x):
        return torch.tanh(self.first(x))

    def forward(self, x):
        if self.style == "plain":
            return self.second(self.hidden(x))
        if self.style == "reentrant":
            return checkpoint(self.second, self.hidden(x), use_reentrant=True)
        return checkpoint(self.second, checkpoint(self.hidden, x, use_reentrant=False), use_reentrant=False)


class Fit(mlo.Problem):
    def training_step(self, batch):
        x, y = batch
        penalty = torch.exp(self.deps.upper.params["penalty"])
        return (self(x) - y).square().mean() + penalty * sum(p.square().sum() for p in self.params.values())


class Validate(mlo.Problem):
    def training_step(self, batch):
        x, y = batch
        return (self.deps.net(x) - y).square().mean()


def fit(style, method, make=Net):
    torch.manual_seed(1)
    net = make(style)
    x = torch.randn(20, 3)
    y = x.sum(1, keepdim=True).sin()
    stage = Fit(
        "net",
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=[(x, y)],
        depends_on={"upper": "penalty"},
        hypergradient=method,
        steps=3,
    )
    upper = nn.ParameterDict({"penalty": torch.tensor(0.5)})
    top = Validate(
        "penalty", upper, optimizer=torch.optim.SGD(upper.parameters(), lr=0.1), data=[(x + 0.5, y)], depends_on=["net"]
    )
    return mlo.Engine([stage, top])


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_gives_the_same_hypergradient(method):
    found = []
    for style in ("plain", "checkpointed"):
        engine = fit(style, method)
        engine.run(3)
        found.append(engine.hypergradient("penalty")["penalty"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_reentrant_checkpointing_is_an_error():
    with pytest.raises(RuntimeError, match="use_reentrant"):
        fit("reentrant", mlo.ConjugateGradient()).step()


class Nested(mlo.Problem):
    """A level whose module is checkpointed, for graphs with responses inside responses."""

    def __init__(self, name, reads, style):
        net = Net(style)
        super().__init__(
            name,
            net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            depends_on=reads,
            hypergradient=mlo.ConjugateGradient(rtol=1e-12),
        )
        self.x = torch.randn(5, 3)

    def training_step(self, batch):
        loss = self(self.x).square().mean() + sum(p.square().sum() for p in self.params.values())
        for d in self.depends_on:
            loss = loss + 0.1 * (self(self.x) - self.deps[d](self.x + 0.5)).square().mean()
        return loss


def test_activation_checkpointing_in_nested_levels():
    found = []
    for style in ("plain", "checkpointed"):
        torch.manual_seed(2)
        names = ["low", "mid", "top"]
        engine = mlo.Engine([Nested(n, [m for m in names if m != n], style) for n in names])
        engine.step()
        found.append(engine.hypergradient("top"))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-12)


# --- modules used in unusual ways ------------------------------------------------------------------------------


class Direct(Net):
    """Its submodules and methods are called directly, its weights are used as attributes, one is tied."""

    def __init__(self, style):
        super().__init__(style)
        self.alias = self.first


class DirectFit(Fit):
    def training_step(self, batch):
        x, y = batch
        net = self.module
        output = net.second(net.hidden(x)) if self.direct else self(x)
        penalty = torch.exp(self.deps.upper.params["penalty"])
        if self.direct:
            return (output - y).square().mean() + penalty * sum(p.square().sum() for p in net.parameters())
        return (output - y).square().mean() + penalty * sum(p.square().sum() for p in self.params.values())


class DirectValidate(Validate):
    def training_step(self, batch):
        x, y = batch
        view = self.deps.net
        if not self.direct:
            return super().training_step(batch)
        hidden = torch.tanh(nn.functional.linear(x, view.params["first.weight"], view.module.alias.bias))
        return (view.module.second(hidden) - y).square().mean()


@pytest.mark.parametrize("method", METHODS)
def test_submodules_and_methods_called_directly(method):
    found = []
    for direct in (False, True):
        engine = fit("plain", method, make=Direct)
        stage, top = engine.problems.values()
        for p, kind in ((stage, DirectFit), (top, DirectValidate)):
            p.__class__, p.direct = kind, direct
        engine.run(3)
        found.append(engine.hypergradient("penalty")["penalty"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


class Recurrent(nn.Module):
    """An LSTM keeps a list of its weights beside the registered ones."""

    def __init__(self, style):
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.lstm(x.unsqueeze(-1))[0][:, -1])


class ByHand(nn.Module):
    """The same LSTM, step by step in plain operations."""

    def __init__(self, style):
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        h, c = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4)
        m = self.lstm
        for t in range(x.shape[1]):
            gates = x[:, t : t + 1] @ m.weight_ih_l0.T + m.bias_ih_l0 + h @ m.weight_hh_l0.T + m.bias_hh_l0
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.out(h)


@pytest.mark.parametrize("method", METHODS)
def test_recurrent_layers(method):
    found = []
    for make in (Recurrent, ByHand):
        engine = fit("plain", method, make=make)
        engine.run(3)
        found.append(engine.hypergradient("penalty")["penalty"])
        assert isinstance(engine.problems["net"].module.lstm._flat_weights[0], nn.Parameter)
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=0)


class Hoarder(Net):
    """Keeps a second reference to its weights, past which no binding can reach."""

    def __init__(self, style):
        super().__init__(style)
        self.kept = [self.first.weight]

    def forward(self, x):
        return self.second(torch.tanh(nn.functional.linear(x, self.kept[0], self.first.bias)))


def test_a_second_reference_to_a_parameter_is_an_error():
    with pytest.raises(
        mlo.EvaluationError, match=r"the parameter 'first.weight' of problem 'net' past.*second reference"
    ):
        fit("plain", mlo.ConjugateGradient(), make=Hoarder).step()


def test_a_parameter_of_another_problem_reached_by_a_closure_is_an_error():
    engine = fit("plain", mlo.ConjugateGradient())
    net, top = engine.problems["net"], engine.problems["penalty"]
    weight = net.module.second.bias
    top.training_step = lambda batch: Validate.training_step(top, batch) + weight.sum()
    with pytest.raises(
        mlo.EvaluationError, match=r"'penalty' reaches the parameter 'second.bias' of problem 'net'.*self.deps"
    ):
        engine.hypergradient("penalty")
    with pytest.raises(mlo.EvaluationError, match=r"'penalty' reaches"):
        engine.step()


def test_parametrized_and_tied_modules():
    class Tied(nn.Module):
        def __init__(self, style):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.out = nn.utils.parametrizations.weight_norm(nn.Linear(3, 1))

        def forward(self, x):
            return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))

    found = []
    for method in (mlo.Identity(scale=0.1), mlo.FiniteDifference(scale=0.1)):
        engine = fit("plain", method, make=Tied)
        engine.step()
        found.append(engine.hypergradient("penalty")["penalty"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_autocast_of_the_forward_pass_holds_inside_methods():
    """Under bf16 autocast both products see a bf16 matrix product, and agree to its accuracy and no better."""
    seen = []

    class Spy(Net):
        def forward(self, x):
            seen.append(self.first(x).dtype)
            return super().forward(x)

    engine = fit("plain", mlo.ConjugateGradient(max_steps=2), make=Spy)
    for p in engine.problems.values():
        p.module.float()
        p.data = [(x.float(), y.float()) for x, y in p.data]
    engine = mlo.Engine(list(engine.problems.values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.step()
    assert seen
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    engine.step()
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_caller_s_grad_mode_does_not_matter(mode):
    expected = fit("plain", mlo.ConjugateGradient())
    engine = fit("plain", mlo.ConjugateGradient())
    expected.step()
    with mode():
        engine.step()
        h = engine.hypergradient("penalty")["penalty"]
    assert torch.equal(h, expected.hypergradient("penalty")["penalty"])
