"""The whole sweep through several stages as one compiled function: the same gradients, steps and reports as without."""

import math
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import mlo
from mlo import compiled_loss, compiled_sweep, traced_sweep
from mlo.random_state import RandomState
from tests.compiling import CAPTURED, MARKS, Doubled

METHODS = {
    "fd": mlo.FiniteDifference(scale=0.3),
    "fd by the learning rate": mlo.FiniteDifference(epsilon=1e-4),
    "identity": mlo.Identity(scale=0.3),
    "cg": mlo.ConjugateGradient(max_steps=3, rtol=0, damping=0.1),
    "neumann": mlo.Neumann(terms=4, scale=0.1, rtol=0),
}
# Differences of gradients enlarge rounding by the inverse of the shift.
ROUNDING = {"rtol": 1e-7, "atol": 1e-10}

pytestmark = MARKS

# Whether the upper problem is compiled too, so that all is one function, or the stage's pullback alone.
both_ways = pytest.mark.parametrize("kind", ["whole", "pullback"])


@pytest.fixture
def called(monkeypatch):
    """The problems of compiled sweeps and pullbacks, one after the other."""
    found = []
    call = compiled_loss.CompiledLoss.__call__

    def watched(self, function, batch, wanted):
        if wanted.traced is traced_sweep._total_gradient:
            found.append(function.__self__.name)
        elif wanted.traced is traced_sweep._pullback:
            found.append("-" + function.__self__.name)
        return call(self, function, batch, wanted)

    monkeypatch.setattr(compiled_loss.CompiledLoss, "__call__", watched)
    return found


class Node(mlo.Problem):
    """A stage or an upper problem: near smooth functions of what it reads, strictly convex in itself."""

    noise = 0.0

    def __init__(self, name, seed, **options):
        generator = torch.Generator().manual_seed(seed)
        module = nn.ParameterDict(
            {"a": torch.randn(4, generator=generator), "b": torch.randn(2, 3, generator=generator)}
        )
        sgd = torch.optim.SGD(
            [{"params": [module["a"]], "lr": 0.05}, {"params": [module["b"]], "lr": 0.1, "weight_decay": 0.02}], lr=0.1
        )
        data = [torch.randn(4, generator=generator) for _ in range(3)]
        super().__init__(name, module, optimizer=sgd, data=data, **options)

    def training_step(self, batch):
        a, b = self.params["a"], self.params["b"]
        loss = 0.5 * a.square().sum() + 0.7 * b.square().sum() + 0.1 * (a.square().square().sum() + b.cosh().sum())
        loss = loss + 0.3 * a.sum().sin() * b.mean() + self.noise * (batch * a).sum()
        for name in self.depends_on:
            other = self.deps[name].params
            loss = loss + (batch * (a - other["a"].tanh())).square().mean()
            loss = loss + 0.2 * (b - (other["b"] + other["a"].mean()).sin()).square().sum()
        return {"loss": loss, "size": a.norm()}


#: What each problem reads, the upper one last.
GRAPHS = {
    "two levels": {"low": ["top"], "top": ["low"]},
    "the last of a chain": {"one": ["top"], "two": ["one", "top"], "three": ["two", "top"], "top": ["three"]},
    "all of a chain": {"one": ["top"], "two": ["one", "top"], "three": ["two", "top"], "top": ["one", "two", "three"]},
    "all of all": {
        "one": ["top"],
        "two": ["one", "top"],
        "three": ["one", "two", "top"],
        "top": ["one", "two", "three"],
    },
    "a stage that does not read the upper problem": {"one": ["top"], "two": ["one"], "top": ["two", "one"]},
    "a stage without a gradient of the upper problem": {"one": [], "two": ["one", "top"], "top": ["two", "one"]},
    "two upper problems": {"low": ["left", "right"], "left": ["low"], "right": ["low"]},
}
CONSTANTS = {"right": ["left"]}


def engine_of(reads, methods, compiled, **options):
    given = [METHODS[m] for m in methods]
    problems = []
    for i, (name, others) in enumerate(reads.items()):
        method = given[i % len(given)] if name not in ("top", "left", "right") else None
        constants = [c for c in CONSTANTS.get(name, ()) if c in reads]
        problems.append(
            Node(
                name, i, depends_on=[*others, *constants], constants=constants, hypergradient=method, compile=compiled,
                **options,
            )
        )  # fmt: skip
    return mlo.Engine(problems)


def state(engine):
    return [p.detach().clone() for problem in engine.problems.values() for p in problem.module.parameters()]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **ROUNDING)


MIXTURES = [["fd", "cg", "identity"], ["neumann", "fd", "fd by the learning rate"]]
CASES = [
    *[(graph, [method]) for graph in ("two levels", "two upper problems") for method in METHODS],
    *[(graph, mixture) for graph in GRAPHS for mixture in MIXTURES if len(GRAPHS[graph]) > 2],
]


@pytest.mark.parametrize(("graph", "methods"), CASES)
def test_hypergradients_training_and_reports_are_those_of_eager_code(graph, methods, called):
    reads, found = GRAPHS[graph], []
    for compiled in (CAPTURED, None):
        engine = engine_of(reads, methods, compiled)
        upper = list(reads)[-1]
        hypergradients = [engine.hypergradient(upper) for _ in range(6)]
        reports = [engine.step() for _ in range(7)]
        hypergradients += [engine.hypergradient(upper) for _ in range(2)]
        found.append((hypergradients, reports, state(engine)))
    (ours, reports, parameters), (theirs, expected, others) = found
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a.values(), b.values())
    assert_same(parameters, others)
    for here, there in zip(reports, expected, strict=True):
        for name, report in there.items():
            assert here[name].loss == pytest.approx(report.loss, rel=1e-9)
            assert here[name].gradient_norm == pytest.approx(report.gradient_norm, rel=1e-6)
            assert here[name].metrics == pytest.approx(report.metrics, rel=1e-9)
            assert list(here[name].solves) == list(report.solves)
            for path, solves in report.solves.items():
                mine = here[name].solves[path]
                for what in ("solves", "products", "iterations", "statuses"):
                    assert getattr(mine, what) == getattr(solves, what)
                for what in ("worst_residual", "gradient_norm"):
                    value = getattr(solves, what)
                    assert getattr(mine, what) == (value if value is None else pytest.approx(value, rel=1e-6))
    assert called.count(upper) >= 7
    assert set(called) <= {"top", "left", "right"}


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
def test_the_default_compiler_gives_the_same(called):
    found = []
    for compiled in (True, None):
        engine = engine_of(GRAPHS["a stage that does not read the upper problem"], ["fd", "cg"], compiled)
        found.append([t for _ in range(6) for t in engine.hypergradient("top").values()])
        engine.run(4)
        found[-1] += state(engine)
    assert_same(*found)
    assert called.count("top") >= 4


def test_nothing_is_written_to_the_parameters():
    engine = engine_of(GRAPHS["all of all"], ["fd"], CAPTURED)
    before = state(engine)
    versions = [p._version for problem in engine.problems.values() for p in problem.module.parameters()]
    for _ in range(7):
        engine.hypergradient("top")
    for a, b in zip(state(engine), before, strict=True):
        assert torch.equal(a, b)
    assert versions == [p._version for problem in engine.problems.values() for p in problem.module.parameters()]


def test_a_long_sweep_is_compiled_stage_by_stage(called, monkeypatch):
    monkeypatch.setattr(compiled_sweep, "_LONGEST", 16)
    found = []
    for compiled in (CAPTURED, None):
        engine = engine_of(GRAPHS["the last of a chain"], ["fd", "cg"], compiled)
        found.append([engine.hypergradient("top") for _ in range(6)])
    for a, b in zip(*found, strict=True):
        assert_same(a.values(), b.values())
    # The solve is too long on its own too.
    assert set(called) == {"-one", "-three"}


@pytest.mark.parametrize(
    "change",
    [
        lambda problem: setattr(problem, "compile", None),
        lambda problem: setattr(problem, "compile", {"backend": "eager"}),
        lambda problem: setattr(problem, "hypergradient", mlo.GMRES(max_steps=20)),
        lambda problem: setattr(problem, "hypergradient", mlo.Unroll(steps=1)),
    ],
    ids=["not compiled", "compiled otherwise", "another solver", "unrolled"],
)
def test_what_cannot_be_in_one_function_leaves_the_other_stages_theirs(change, called):
    found = []
    for compiled in (CAPTURED, None):
        problems = list(engine_of(GRAPHS["the last of a chain"], ["identity"], compiled).problems.values())
        if compiled or problems[1].compile is None:
            change(problems[1])
        if compiled is None:
            problems[1].compile = None
        engine = mlo.Engine(problems)
        engine.step()
        found.append([engine.hypergradient("top") for _ in range(6)])
    for a, b in zip(*found, strict=True):
        assert_same(a.values(), b.values())
    assert {"-one", "-three"} <= set(called)
    assert "top" not in called


class Tracks(nn.Module):
    """A buffer of data, and one that each evaluation writes to and reads."""

    def __init__(self, writes):
        super().__init__()
        self.writes = writes
        self.register_buffer("data", torch.linspace(-1, 1, 4))
        self.register_buffer("count", torch.zeros(()))
        self.a = nn.Parameter(torch.ones(4))

    def forward(self):
        if self.writes:
            self.count += 1
        return (self.data - self.a) * (1 + 1 / (1 + self.count))


class Tracked(mlo.Problem):
    def training_step(self, batch):
        x = self.deps.top.params["x"]
        return (self() - x).square().sum() + 0.1 * self.params["a"].square().square().sum()


class Top(mlo.Problem):
    def training_step(self, batch):
        return (self.deps.low().sin() * self.params["x"].exp()).sum()


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_buffers(method, writes, called):
    """Those that are only read may be in one function; each evaluation sees others as they are outside."""
    found = []
    for compiled in (CAPTURED, None):
        low, top = Tracks(writes), nn.ParameterDict({"x": torch.linspace(0, 1, 4)})
        sgd = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (low, top)]
        lower = Tracked(
            "low", low, optimizer=sgd[0], depends_on=["top"], hypergradient=METHODS[method], compile=compiled
        )
        engine = mlo.Engine([lower, Top("top", top, optimizer=sgd[1], depends_on=["low"], compile=compiled)])
        hypergradients = [engine.hypergradient("top")["x"] for _ in range(6)]
        engine.run(5)
        found.append([*hypergradients, low.count.clone(), low.a.detach(), top["x"].detach()])
    assert_same(*found)
    assert called.count("top") == (1 if writes else 5)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_whether_anything_was_drawn(draw):
    before = RandomState.capture()
    assert not before.moved()
    draw()
    assert before.moved()
    before.restore()
    assert not before.moved()


class Embeds(mlo.Problem):
    def training_step(self, batch):
        low, rows = self.deps.low.params["a"], self(torch.tensor([0, 2, 2]))
        return (rows.sum(1)[:2].sum() - low).square().sum()


@both_ways
@pytest.mark.parametrize("stance", ["default", "force_eager"])
@pytest.mark.parametrize("rows", [lambda top: top.params["weight"][:2], lambda top: top(torch.tensor([0, 1]))])
def test_sparse_gradients_of_the_upper_problem(rows, stance, kind):
    """Its own, and those that come from a stage; compiled code has none, and such a sweep goes on in parts."""

    class Far(mlo.Problem):
        def training_step(self, batch):
            return (self.params["a"] - self.deps.top.params["weight"].sum()).square().sum()

    class Near(mlo.Problem):
        def training_step(self, batch):
            return (self.params["a"] - self.deps.far.params["a"] - 2 * rows(self.deps.top).sum(1)[:1]).square().sum()

    found = []
    for compiled in (CAPTURED, None):
        torch.manual_seed(0)
        options = {"hypergradient": METHODS["identity"], "compile": compiled}
        far = Far("far", nn.ParameterDict({"a": torch.zeros(2)}), depends_on=["top"], **options)
        near = Near("low", nn.ParameterDict({"a": torch.ones(2)}), depends_on=["far", "top"], **options)
        top = nn.Embedding(4, 3, sparse=True)
        upper = Embeds("top", top, depends_on=["low"], compile=compiled if kind == "whole" else None)
        engine = mlo.Engine([far, near, upper])
        with torch.compiler.set_stance(stance):
            found.append([engine.hypergradient("top")["weight"].to_dense() for _ in range(6)])
    assert_same(*found)


class Curved(mlo.Problem):
    def training_step(self, batch):
        return self.scale * (self.params["a"] - self.deps.top.params["x"]).square().sum()


def test_a_loss_that_is_very_different_on_both_sides_is_still_one_function(called):
    """Now and then it is looked at without, whether it is one at all."""

    class Cubes(mlo.Problem):
        def training_step(self, batch):
            return self.deps.low.params["a"].pow(3).sum()

    low = Curved(
        "low",
        nn.ParameterDict({"a": torch.ones(2)}),
        depends_on=["top"],
        hypergradient=mlo.FiniteDifference(scale=0.5, epsilon=0.3),
        compile=CAPTURED,
    )
    low.scale = 1.0
    top = Cubes("top", nn.ParameterDict({"x": torch.full((2,), 0.9)}), depends_on=["low"], compile=CAPTURED)
    engine = mlo.Engine([low, top])
    for _ in range(40):
        torch.testing.assert_close(engine.hypergradient("top")["x"], torch.full((2,), 3.0), rtol=1e-9, atol=0)
    assert called.count("top") > 30
    assert engine._members["low"].in_doubt.count == 40
    assert engine._sweeps["top"].total._left == compiled_sweep.ATTEMPTS


class Low(mlo.Problem):
    def training_step(self, batch):
        a, x = self.params["a"], self.deps.top.params["x"]
        return (a - x.sin()).square().sum() + 0.1 * a.pow(4).sum()


class High(mlo.Problem):
    """Whose cotangents are `factor` times a cosine."""

    factor = 1.0

    def training_step(self, batch):
        return self.factor * self.deps.low.params["a"].sin().sum() + 0.1 * self.params["x"].square().sum()


def two_levels(kind, method, compiled, *, low=Low, high=High, module=None, dtype=torch.float64, **options):
    module = nn.ParameterDict({"a": torch.linspace(0.2, 1, 4, dtype=dtype)}) if module is None else module()
    top = nn.ParameterDict({"x": torch.linspace(0, 1, 4, dtype=dtype)})
    sgd = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, top)]
    lower = low("low", module, optimizer=sgd[0], depends_on=["top"], hypergradient=method, compile=compiled, **options)
    upper = high("top", top, optimizer=sgd[1], depends_on=["low"], compile=compiled if kind == "whole" else None)
    return mlo.Engine([lower, upper])


def attempts_left(engine, kind):
    sweep = engine._sweeps["top"]
    return (sweep.total if kind == "whole" else sweep.pullbacks["low"])._left


def compare(kind, method, act, *, rtol=1e-6, **options):
    """Let `act(engine)` return tensors, of the compiled engine and of the eager one."""
    found = []
    for compiled in (CAPTURED, None):
        torch.manual_seed(3)
        engine = two_levels(kind, METHODS.get(method, method), compiled, **options)
        found.append([*act(engine), torch.get_rng_state()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-30, equal_nan=True)


def each(engine, count=8):
    return [engine.hypergradient("top")["x"] for _ in range(count)]


@both_ways
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [0.0, math.nan, 1e-25, 1e25])
@pytest.mark.filterwarnings("ignore::mlo.BreakdownWarning")
def test_cotangents_of_any_length(factor, method, kind):
    class Scaled(High):
        def training_step(self, batch):  # the loss is finite, whatever its gradient is
            a = self.deps.low.params["a"]
            return ((a - a.detach()) * self.factor).nan_to_num().sum() + 0.1 * self.params["x"].square().sum()

    def act(engine):
        found = []
        for i in range(14):
            engine.problems["top"].factor = torch.tensor(1.0 if i % 5 == 4 else factor)
            found += each(engine, 1)
        return found

    compare(kind, method, act, high=Scaled)
    if factor:  # squares beyond the range of the dtype; of differences, rounding remains
        compare(kind, method, act, high=Scaled, dtype=torch.float32, rtol=0.02 if "fd" in method else 1e-5)


@both_ways
@pytest.mark.parametrize("method", ["identity", "cg"])
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**-20, 2.0**40])
def test_long_and_short_cotangents_are_scaled_by_powers_of_two(factor, method, kind, called):
    """So that the result is scaled by nothing else, and the solve remains one function."""
    found = []
    for f in (1.0, factor):
        engine = two_levels(kind, METHODS[method], CAPTURED)
        engine.problems["top"].factor = f
        engine.problems["top"].module["x"].data.zero_()
        found.append(each(engine, 6)[-1] / f)
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)
    assert found[0].abs().min() > 0.01
    assert len(called) == 6


class Replaces(nn.Module):
    """A buffer that each evaluation replaces, by one that matters little: a difference is not seen to be doubtful."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.linspace(0.2, 1, 4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self):
        self.count = self.count + 1
        return self.a * (1 + 1e-3 / (1 + self.count))


@both_ways
def test_buffers_that_are_replaced(kind):
    class Reads(mlo.Problem):
        def training_step(self, batch):
            return 1 + (self() - self.deps.top.params["x"]).square().sum()

    def act(engine):
        return [*each(engine), *[torch.tensor(engine.step()["top"].loss) for _ in range(6)], *state(engine)]

    compare(kind, "fd", act, low=Reads, module=Replaces)
    compare("whole", "cg", act, high=type("Own", (High,), {"training_step": _with_own_buffer}))


def _with_own_buffer(self, batch):
    if "count" not in self.module._buffers:
        self.module.register_buffer("count", torch.zeros(()))
    self.module.count = self.module.count + 1
    return self.deps.low.params["a"].sin().sum() + (self.params["x"] * self.module.count).square().sum()


def test_what_the_upper_loss_keeps_and_logs_are_the_parameters():
    """And not those to which a difference has moved meanwhile."""

    class Keeps(High):
        def training_step(self, batch):
            a = self.deps.low.params["a"]
            self.kept = a.detach()
            return {"loss": super().training_step(batch), "first": a[0]}

    def act(engine):
        found = []
        for _ in range(7):
            before = engine.problems["low"].module["a"]
            report = engine.step()["top"]
            torch.testing.assert_close(engine.problems["top"].kept, before.detach(), rtol=0, atol=0)
            assert report.metrics["first"] == before[0].item()
            found.append(torch.tensor(report.loss))
        return found

    compare("whole", mlo.FiniteDifference(epsilon=0.1), act, high=Keeps)


@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_for_solves_are_drawn_when_they_are_without(shuffled):
    """The loaders draw from torch's generator, and only for stages that the loss has read."""
    data = [torch.full((4,), float(i)) for i in range(5)]
    loader = torch.utils.data.DataLoader(data, batch_size=None, shuffle=shuffled)

    class Draws(Low):
        def training_step(self, batch):
            return (batch + 1) @ (self.params["a"] - self.deps.top.params["x"].sin()).square()

    class Sometimes(High):
        def training_step(self, batch):
            rest = self.params["x"].square().sum()
            return rest + self.deps.low.params["a"].sin().sum() if self.reads else rest

    def act(engine):
        found = []
        for i in range(12):
            engine.problems["top"].reads = i % 3 != 2
            found.append(torch.tensor(engine.step()["top"].gradient_norm))
        return [*found, *state(engine)]

    compare("whole", "cg", act, low=Draws, high=Sometimes, data=data, solve_data=loader)


@both_ways
@pytest.mark.parametrize("method", ["fd", "cg"])
def test_modules_in_another_precision(method, kind):
    def act(engine):
        found = each(engine, 6)
        for problem in engine.problems.values():
            problem.module.float()
        return [*found, *each(engine, 4)]

    compare(kind, method, act, rtol=0.02 if "fd" in method else 1e-5)


@both_ways
def test_a_factor_that_half_precision_cannot_multiply_by(kind):
    class Wide(Low):
        def training_step(self, batch):
            a, x = self.params["a"].float(), self.deps.top.params["x"].float()
            return 1e4 * (a - x.sin()).square().sum()

    class Half(High):
        def training_step(self, batch):
            return self.deps.low.params["a"].float().sin().sum()

    method = mlo.FiniteDifference(scale=3e-7, epsilon=0.125)
    compare(kind, method, each, low=Wide, high=Half, dtype=torch.float16, rtol=0.03)


@both_ways
def test_gradient_norms_beyond_single_precision(kind):
    class Flat(Low):
        def training_step(self, batch):
            x = self.deps.top.params["x"]
            return (
                1e-25 * (self.params["a"] * x).sum()
                + 0.5 * (self.params["a"] - self.params["a"].detach()).square().sum()
            )

    def act(engine):
        solves = [engine.step()["top"].solves["top/low"] for _ in range(6)]
        if engine.problems["low"].compile:
            assert attempts_left(engine, kind) == compiled_sweep.ATTEMPTS
        return [torch.tensor(s.gradient_norm) for s in solves]

    compare(kind, "identity", act, low=Flat, dtype=torch.float32, rtol=1e-4)


@both_ways
def test_a_loss_of_a_stage_that_calls_backward(kind):
    class Backward(Low):
        calls = False

        def training_step(self, batch):
            loss = super().training_step(batch)
            if self.calls:
                loss.backward(retain_graph=True)
            return loss

    def act(engine):
        found = each(engine, 5)
        engine.problems["low"].calls = True
        return [*found, *each(engine, 4)]

    compare(kind, "cg", act, low=Backward)


class Writes(High):
    what = None

    def training_step(self, batch):
        with torch.no_grad():
            if self.what == "batch":
                batch += 1
            elif self.what == "own":
                self.params["x"].mul_(2)
        return super().training_step(batch) + 0 * batch.sum()


@pytest.mark.parametrize("what", ["batch", "own"])
def test_an_upper_loss_that_begins_to_write_to_what_it_reads(what):
    first = two_levels("whole", METHODS["cg"], CAPTURED)
    given = {name: getattr(first.problems["top"], name) for name in ("module", "optimizer", "compile")}
    upper = Writes("top", depends_on=["low"], data=[torch.ones(2)], **given)
    engine = mlo.Engine([first.problems["low"], upper])
    for _ in range(5):
        engine.step()
    upper.what = what
    with pytest.raises(mlo.EvaluationError, match="in place"):
        engine.step()


@both_ways
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: {"loss": loss, "note": "text"}, "'note'"),
        (lambda loss: loss.long(), "int64"),
        (lambda loss: {"cost": loss}, "'loss'"),
        (lambda _: 1.0, "float"),
    ],
)
@pytest.mark.parametrize("stance", ["default", "force_eager"])
def test_a_loss_of_a_stage_that_is_none_later(returned, message, stance, kind):
    class Later(Low):
        returned = None

        def training_step(self, batch):
            loss = super().training_step(batch)
            return loss if self.returned is None else self.returned(loss)

    engine = two_levels(kind, METHODS["fd"], CAPTURED, low=Later)
    with torch.compiler.set_stance(stance):
        each(engine, 5)
        engine.problems["low"].returned = returned
        with pytest.raises(mlo.LossError, match=message):
            engine.hypergradient("top")


def test_two_engines_over_the_same_problems():
    """Views of dependencies are made anew for the other engine, and not by what is compiled."""
    engine = two_levels("whole", METHODS["fd"], CAPTURED)
    other = mlo.Engine(engine.problems.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error", mlo.MloWarning)
        for _ in range(6):
            torch.testing.assert_close(each(engine, 1), each(other, 1), **ROUNDING)
    assert all(e._sweeps["top"].total.hopeful for e in (engine, other))


@both_ways
@pytest.mark.parametrize("begin", [0, 6])
@pytest.mark.parametrize("method", ["fd", "fd by the learning rate"])
def test_a_stage_that_begins_to_maximise(method, begin, kind, called):
    def act(engine):
        found = each(engine, begin)
        engine.problems["low"].optimizer.param_groups[0]["maximize"] = True
        return [*found, *each(engine, 6)]

    compare(kind, method, act)
    assert len(called) >= 3


@both_ways
@pytest.mark.parametrize("method", ["cg", "identity", "neumann"])
def test_a_weight_decay_that_changes(method, kind, called):
    def act(engine):
        found = each(engine, 6)
        engine.problems["low"].optimizer.param_groups[0]["weight_decay"] = 0.5
        found += each(engine, 6)
        engine.problems["low"].optimizer.param_groups[0]["weight_decay"] = 0.1
        return [*found, *each(engine, 6)]

    compare(kind, method, act)
    assert len(called) >= 9


@both_ways
@pytest.mark.parametrize("method", ["identity", "cg"])
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_cotangents_beyond_the_squares_of_single_precision_stay_in_one_function(factor, method, kind, called):
    class Scaled(High):
        def training_step(self, batch):
            a = self.deps.low.params["a"]
            return ((a - a.detach()) * factor).sum()

    engine = two_levels(kind, METHODS[method], CAPTURED, high=Scaled, dtype=torch.float32)
    each(engine, 8)
    assert attempts_left(engine, kind) == compiled_sweep.ATTEMPTS
    assert called


def test_solves_that_end_early_now_and_then_are_still_tried(called):
    """Attempts are counted in a row."""

    class Sometimes(Low):
        flat = False

        def training_step(self, batch):
            a, x = self.params["a"], self.deps.top.params["x"]
            curvatures = torch.ones(4) if self.flat else torch.arange(1.0, 5.0)
            return (curvatures * (a - x).square()).sum()

    def act(engine):
        found = []
        for i in range(40):
            engine.problems["low"].flat = i % 4 == 3
            found += each(engine, 1)
        if engine.problems["low"].compile:
            assert engine._sweeps["top"].total.hopeful
        return found

    compare("whole", mlo.ConjugateGradient(max_steps=3, rtol=0), act, low=Sometimes)


@both_ways
def test_tiny_cotangents(kind, called):
    factor = 3e-162

    class Scaled(High):
        def training_step(self, batch):
            a = self.deps.low.params["a"]
            return ((a - a.detach()) * factor).sum()

    class Cubic(Low):
        def training_step(self, batch):
            a, x = self.params["a"], self.deps.top.params["x"]
            return (a.pow(4) * (x + 1)).sum()

    compare(
        kind,
        mlo.FiniteDifference(scale=1.0, epsilon=0.5),
        lambda e: [t / factor for t in each(e)],
        low=Cubic,
        high=Scaled,
    )
    assert called


@both_ways
def test_asymmetry_is_looked_at_in_the_second_solve_too(kind):
    class Stops(Low):
        def training_step(self, batch):
            a, x = self.params["a"], self.deps.top.params["x"]
            return (x.exp() * (a - 2).square().detach()).sum() * 0.1 + ((a - x) * a.detach()).square().sum()

    engine = two_levels(kind, METHODS["fd"], CAPTURED, low=Stops)
    for _ in range(4):
        engine.hypergradient("low")  # whose evaluations count as those of the stage
    engine.hypergradient("top")
    with pytest.warns(mlo.MloWarning, match="depend on their order"):
        engine.hypergradient("top")


@both_ways
@pytest.mark.filterwarnings("ignore::mlo.MloWarning")
@pytest.mark.parametrize("method", ["fd", "cg"])
def test_a_loss_that_draws_is_not_tried(method, kind, called):
    class Draws(Low):
        def training_step(self, batch):
            return (1 + 0.1 * random.random()) * super().training_step(batch)

    def act(engine):
        random.seed(1)
        return [*each(engine), torch.tensor(random.random())]

    compare(kind, method, act, low=Draws)
    assert called == []


@pytest.mark.filterwarnings("ignore::mlo.MloWarning")
def test_a_loss_that_cannot_be_compiled_is_not_tried(called):
    class Breaks(Low):
        def training_step(self, batch):
            torch._dynamo.graph_break()
            return super().training_step(batch)

    engine = two_levels("whole", METHODS["cg"], CAPTURED, low=Breaks, data=[torch.ones(2)])
    for _ in range(8):
        engine.step()
    assert engine._members["low"].compiled.failure
    assert called == []


@pytest.mark.parametrize("method", ["fd", "cg"])
def test_a_parameter_that_is_frozen_later(method, called):
    found = []
    for compiled in (CAPTURED, None):
        engine = engine_of(GRAPHS["all of a chain"], [method], compiled)
        hypergradients = [engine.hypergradient("top") for _ in range(6)]
        engine.problems["two"].module["b"].requires_grad_(False)
        hypergradients += [engine.hypergradient("top") for _ in range(6)]
        engine.problems["one"].module["a"] = nn.Parameter(torch.linspace(0, 1, 4))
        engine.problems["one"].optimizer.param_groups[0]["params"] = [engine.problems["one"].module["a"]]
        hypergradients += [engine.hypergradient("top") for _ in range(6)]
        found.append(hypergradients)
    for a, b in zip(*found, strict=True):
        assert_same(a.values(), b.values())
    assert len(called) > 6


@both_ways
def test_huge_cotangents(kind, called):
    factor = 1e200

    class Scaled(High):
        def training_step(self, batch):
            a = self.deps.low.params["a"]
            return ((a - a.detach()) * factor).sum()

    compare(kind, mlo.FiniteDifference(scale=0.5), lambda e: [t / factor for t in each(e)], high=Scaled)
    assert called


def test_a_shared_part_with_buffers():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("data", torch.linspace(-1, 1, 4))

    part = Part()

    class With(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.part = part
            self.register_parameter(name, nn.Parameter(torch.linspace(0.2, 1, 4)))

    class L(mlo.Problem):
        def training_step(self, batch):
            return (self.params["a"] - self.deps.top.params["x"] * self.module.part.data).square().sum()

    class H(mlo.Problem):
        def training_step(self, batch):
            return (self.deps.low.params["a"] * self.module.part.data).sin().sum() + 0.1 * self.params[
                "x"
            ].square().sum()

    low, top = With("a"), With("x")
    before = part.data
    engine = mlo.Engine(
        [
            L("low", low, depends_on=["top"], hypergradient=METHODS["identity"], compile=CAPTURED),
            H("top", top, depends_on=["low"], compile=CAPTURED),
        ]
    )
    for _ in range(6):
        engine.hypergradient("top")
        assert part.data is before
    assert engine._sweeps["top"].total.hopeful


def test_frames_are_put_back(called):
    engine = two_levels("whole", METHODS["fd"], CAPTURED)
    for _ in range(6):
        engine.hypergradient("top")
        for problem, name in (("low", "a"), ("top", "x")):
            problem = engine.problems[problem]
            assert problem._frame is None
            assert problem.params[name] is problem.module[name]
    assert called


@pytest.mark.parametrize("way", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_between_two_checks(way):
    found = []
    for compiled in (CAPTURED, None):
        engine, calls = two_levels("whole", METHODS["cg"], compiled), []
        engine.run(5)
        getattr(engine.problems["top"].module["x"], way)(lambda _, calls=calls: calls.append(1))
        engine.step()
        found.append(len(calls))
    assert found[0] == found[1] > 0


@pytest.fixture
def asked(monkeypatch):
    """What all compiled losses were asked for, by whole, pullback or else."""
    found = []
    call = compiled_loss.CompiledLoss.__call__

    def watched(self, function, batch, wanted):
        found.append(
            {traced_sweep._total_gradient: "whole", traced_sweep._pullback: "pullback"}.get(wanted.traced, "one pass")
        )
        return call(self, function, batch, wanted)

    monkeypatch.setattr(compiled_loss.CompiledLoss, "__call__", watched)
    return found


def test_parts_are_not_compiled_where_a_number_sends_the_whole_back(asked):
    class Either(Low):
        curvatures = torch.linspace(1, 3, 4)

        def training_step(self, batch):
            return (self.curvatures * (self.params["a"] - self.deps.top.params["x"]).square()).sum()

    engine = two_levels("whole", mlo.ConjugateGradient(max_steps=3, rtol=0), CAPTURED, low=Either)
    each(engine, 6)
    engine.problems["low"].curvatures = torch.ones(4)  # one step is enough: nothing more is to be compiled for it
    for _ in range(4):
        asked.clear()
        each(engine, 1)
        assert asked in ([], ["whole"])


def test_parts_are_not_compiled_where_torch_refuses_the_whole(asked):
    class HasFunction(Low):
        def training_step(self, batch):
            return (self.params["a"] - Doubled.apply(self.deps.top.params["x"])).square().sum()

    engine = two_levels("whole", METHODS["cg"], CAPTURED, low=HasFunction)
    for _ in range(8):
        asked.clear()
        each(engine, 1)
        assert asked == ["whole"] or "whole" not in asked


def test_several_batches_of_the_upper_problem():
    class Batches(High):
        def training_step(self, batch):
            return batch * super().training_step(batch)

    found = []
    for compiled in (CAPTURED, None):
        first = two_levels("whole", METHODS["cg"], compiled)
        given = {name: getattr(first.problems["top"], name) for name in ("module", "optimizer", "compile")}
        data = [torch.tensor(float(i)) for i in range(1, 6)]
        upper = Batches("top", depends_on=["low"], data=data, accumulate=2, **given)
        engine = mlo.Engine([first.problems["low"], upper])
        for _ in range(7):
            engine.step()
        found.append(state(engine))
    assert_same(*found)


def test_an_upper_loss_that_draws():
    """What the attempt has drawn is drawn again."""

    class Draws(High):
        def training_step(self, batch):
            return super().training_step(batch) * (1 + torch.rand(()))

    def act(engine):
        return [torch.tensor(engine.step()["top"].loss) for _ in range(7)] + state(engine)

    compare("whole", "cg", act, high=Draws)


@both_ways
@pytest.mark.parametrize("base", [mlo.FiniteDifference, mlo.Identity, mlo.ConjugateGradient, mlo.Neumann])
def test_methods_of_ones_own_are_run(base, kind, called):
    class Own(base):
        def pullback(self, *arguments):
            return tuple(None if t is None else 2 * t for t in super().pullback(*arguments))

    method = Own(terms=2) if base is mlo.Neumann else Own()
    compare(kind, method, each)
    assert called == []


@both_ways
@pytest.mark.parametrize("method", ["cg", "identity"])
def test_a_stage_that_draws(method, kind, called):
    class Draws(Low):
        def training_step(self, batch):
            return ((1 + torch.rand(4)) * (self.params["a"] - self.deps.top.params["x"]).square()).sum()

    def act(engine):
        found = [torch.tensor(engine.step()["top"].gradient_norm) for _ in range(8)]
        return [*found, *state(engine)]

    compare(kind, method, act, low=Draws, data=[torch.ones(2)])
    if kind == "pullback":
        assert called


@both_ways
def test_parameters_that_are_zero(kind, called):
    compare(kind, "fd", each, module=lambda: nn.ParameterDict({"a": torch.zeros(4)}))
    assert called


@both_ways
def test_a_multiple_beyond_the_range_of_the_dtype(kind, called):
    found = []
    for compiled in (CAPTURED, None):
        engine = two_levels(kind, mlo.Identity(scale=1e39), compiled, dtype=torch.float32)
        warned = []
        for _ in range(8):
            with warnings.catch_warnings(record=True) as w:
                warnings.simplefilter("always", mlo.BreakdownWarning)
                warned.append(
                    (
                        engine.hypergradient("top")["x"].isfinite().all().item(),
                        sum(x.category is mlo.BreakdownWarning for x in w),
                    )
                )
        found.append(warned)
    assert found[0] == found[1]
    assert sum(n for _, n in found[1]) > 0
    assert called


@pytest.mark.parametrize("compiled", [CAPTURED, None])
def test_the_last_factor_is_not_rounded_to_half_precision(compiled, called):
    class Wide(Low):
        def training_step(self, batch):
            return 1e4 * (self.params["a"].float() * self.deps.top.params["x"].float()).sum()

    class Half(High):
        def training_step(self, batch):
            return self.deps.low.params["a"].float().sin().sum()

    method = mlo.FiniteDifference(scale=1e-8, epsilon=0.125)
    engine = two_levels("whole", method, compiled, low=Wide, high=Half, dtype=torch.float16)
    found = each(engine, 6)[-1]
    assert bool(called) is bool(compiled)
    torch.testing.assert_close(found.double(), -1e-4 * torch.linspace(0.2, 1, 4).cos().double(), rtol=0.01, atol=0)


@pytest.mark.parametrize("method", ["cg", "identity"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_stage_whose_loss_holds_a_response(method, whole, called):
    found = []
    for compiled in (CAPTURED, None):
        reads = {"low": ["mid", "top"], "mid": ["low", "top"], "top": ["mid"]}
        problems = list(engine_of(reads, [method], compiled).problems.values())
        if not whole:
            problems[2].compile = None
        engine = mlo.Engine(problems)
        found.append([engine.hypergradient("top") for _ in range(6)])
    for a, b in zip(*found, strict=True):
        assert_same(a.values(), b.values())
    assert not {"-mid", "top"} & set(called)


@pytest.mark.parametrize("method", ["fd", "cg"])
def test_pullbacks_past_a_constant(method, called):
    found = []
    for compiled in (CAPTURED, None):
        problems = engine_of(GRAPHS["two upper problems"], [method], compiled).problems
        problems["right"].compile = None
        engine = mlo.Engine(problems.values())
        found.append([engine.hypergradient("right") for _ in range(6)])
    for a, b in zip(*found, strict=True):
        assert_same(a.values(), b.values())
    assert "-low" in called
