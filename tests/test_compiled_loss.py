"""Problems with `compile=`: one compiled function of the loss and its derivatives, and the same results as without.

Most tests use the backend that captures the passes and runs them eagerly: what could go wrong is what is captured, and
that it is taken for the same function at another time. One takes the default backend, which needs a C++ compiler.
"""

import copy
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

import mlo
from mlo import compiled_loss, compiled_sweep, evaluation, traced, traced_sweep
from tests.compiling import CAPTURED, MARKS, Doubled

FIRST_ORDER = {
    "fd": mlo.FiniteDifference(),
    "identity": mlo.Identity(scale=None),
    "neumann by differences": mlo.Neumann(terms=3, scale=0.1, rtol=0, product=mlo.CentralDifferences()),
    "f2sa": mlo.F2SA(),
    "unroll by differences": mlo.Unroll(product=mlo.CentralDifferences()),
}

WHOLE_SOLVES = {
    "cg": mlo.ConjugateGradient(max_steps=3, rtol=0, damping=1.0),
    "cg to a tolerance": mlo.ConjugateGradient(max_steps=4, rtol=1e-6, atol=1e-8, damping=2.0),
    "neumann": mlo.Neumann(terms=4),
    "one term": mlo.Neumann(terms=1, scale=0.3),
    "neumann in full": mlo.Neumann(terms=6, scale=0.02, rtol=0),
}

pytestmark = MARKS


def batches(count, first=0):
    generator = torch.Generator().manual_seed(first)
    return [(torch.randn(10, 5, generator=generator), torch.arange(10) % 3) for _ in range(count)]


class Network(mlo.Problem):
    """Weighted examples; `temperature` is a number that may change between steps."""

    temperature = 1.0

    def training_step(self, batch):
        x, y = batch
        weights = self.deps.weights.params["logit"].sigmoid()
        logits = self(x)
        loss = self.temperature * (weights * F.cross_entropy(logits, y, reduction="none")).mean()
        loss = loss + 0.05 * sum(p.square().sum() for p in self.params.values())
        return {"loss": loss, "accuracy": (logits.argmax(1) == y).double().mean(), "compiled": compiling()}


class Validation(mlo.Problem):
    def training_step(self, batch):
        x, y = batch
        return {"loss": F.cross_entropy(self.deps.network(x), y), "compiled": compiling()}


def compiling():
    return float(torch.compiler.is_compiling())


def engine_of(compiled, method, *, problem=Network, layers=(), frozen=False, whole=True, **options):
    """Return two levels; unless it is `whole`, the upper problem stays eager, so that no function holds both."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(5, 6), *[layer() for layer in layers], nn.Tanh(), nn.Linear(6, 3))
    if frozen:
        network[0].bias.requires_grad_(False)
    logit = nn.ParameterDict({"logit": torch.linspace(-1, 1, 10)})
    lower = problem(
        "network",
        network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        data=batches(4),
        depends_on=["weights"],
        hypergradient=method,
        compile=compiled,
        **options,
    )
    upper = Validation(
        "weights",
        logit,
        optimizer=torch.optim.Adam(logit.parameters(), lr=0.05),
        data=batches(2, first=7),
        depends_on=["network"],
        compile=compiled if whole else None,
    )
    return mlo.Engine([lower, upper])


def trained(engine, steps=12):
    """Return everything that training has led to, and one more hypergradient."""
    for _ in range(steps):
        engine.step()
    torch.manual_seed(2)
    found = [t for p in engine.problems.values() for t in p.module.state_dict().values()]
    return [t.detach().clone() for t in (*found, *engine.hypergradient("weights").values())]


def assert_same(found, expected):
    """Equal but for rounding, which differences of gradients enlarge by the inverse of the shift."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


class Counting(nn.Module):
    """Another function at each call, as far as nobody puts its buffer back."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x * (1 + 1 / self.count)


VARIANTS = {
    "plain": {},
    "a buffer that the loss reads": {"layers": (Counting,)},
    "batch norm and dropout": {"layers": (lambda: nn.BatchNorm1d(6), lambda: nn.Dropout(0.5))},
    "several batches": {"accumulate": 2},
    "other batches for solves": {"solve_batches": 3},
    "a frozen parameter": {"frozen": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", [*FIRST_ORDER, *WHOLE_SOLVES])
@pytest.mark.filterwarnings("ignore::mlo.BreakdownWarning")
def test_training_and_hypergradients_are_those_of_eager_code(method, variant):
    options, given = VARIANTS[variant], {**FIRST_ORDER, **WHOLE_SOLVES}[method]
    eager = trained(engine_of(False, given, **options))
    for whole in (True, False) if given.traced_pullback() else (True,):
        assert_same(trained(engine_of(CAPTURED, given, whole=whole, **options)), eager)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
@pytest.mark.parametrize("method", ["fd", "identity", "cg", "neumann"])
def test_the_default_compiler_gives_the_same_with_the_same_dropout_masks(method):
    options, given = VARIANTS["batch norm and dropout"], {**FIRST_ORDER, **WHOLE_SOLVES}[method]
    eager = trained(engine_of(False, given, **options), steps=4)
    assert_same(trained(engine_of(True, given, **options), steps=4), eager)


def test_what_is_no_check_is_compiled():
    """Evaluations 1, 2, 4, 8, … look at the graph of the loss, which compiled code has none of."""
    engine = engine_of(CAPTURED, mlo.FiniteDifference())
    compiled = []
    for _ in range(8):
        reports = engine.step()
        compiled.append(tuple(reports[name].metrics["compiled"] for name in ("network", "weights")))
    assert compiled == [(float(i not in (1, 2, 4, 8)),) * 2 for i in range(1, 9)]


def test_compiled_derivatives_are_those_of_the_closed_form():
    """w*(x) = x² / 4 for the loss 2w² − x²·w, whose Hessian is 4: Identity(1/4) and its difference are exact."""

    class Lower(mlo.Problem):
        def training_step(self, batch):
            w, x = self.params["w"], self.deps.upper.params["x"]
            return (2 * w.square() - w * x.square()).sum()

    class Upper(mlo.Problem):
        def training_step(self, batch):
            return self.deps.lower.params["w"].pow(3).sum()

    x = torch.tensor([1.0, -2.0, 3.0])
    for method in (mlo.Identity(scale=0.25), mlo.FiniteDifference(scale=0.25)):
        low, top = nn.ParameterDict({"w": x.square() / 4}), nn.ParameterDict({"x": x.clone()})
        lower = Lower("lower", low, depends_on=["upper"], hypergradient=method, compile=CAPTURED)
        engine = mlo.Engine([lower, Upper("upper", top, depends_on=["lower"], compile=CAPTURED)])
        for _ in range(6):
            found = engine.hypergradient("upper")["x"]
        torch.testing.assert_close(found, 3 * (x.square() / 4).square() * x / 2, rtol=1e-8, atol=0)


def test_a_stage_that_the_upper_problem_maximises_over():
    """The sign of g is that of the optimizer, in compiled products as in others."""

    def hypergradient(compiled):
        engine = engine_of(compiled, mlo.Identity(scale=0.3))
        engine.problems["network"].optimizer.param_groups[0]["maximize"] = True
        return [engine.hypergradient("weights")["logit"] for _ in range(6)][-1]

    torch.testing.assert_close(hypergradient(CAPTURED), hypergradient(False), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["identity", "cg", "neumann"])
def test_reports_are_those_of_eager_code(method):
    found = []
    for compiled in (False, CAPTURED):
        engine = engine_of(compiled, {**FIRST_ORDER, **WHOLE_SOLVES}[method])
        found.append(engine.run(7))
    for name, eager in found[0].items():
        captured = found[1][name]
        assert captured.loss == pytest.approx(eager.loss, rel=1e-9)
        assert captured.gradient_norm == pytest.approx(eager.gradient_norm, rel=1e-9)
        assert captured.metrics.get("accuracy") == eager.metrics.get("accuracy")
    eager, captured = (reports["weights"].solves["weights/network"] for reports in found)
    assert captured.gradient_norm == pytest.approx(eager.gradient_norm, rel=1e-9)
    assert captured.worst_residual == (eager.worst_residual and pytest.approx(eager.worst_residual, rel=1e-9))
    for what in ("solves", "products", "iterations", "statuses"):
        assert getattr(captured, what) == getattr(eager, what)


def test_the_numbers_of_conjugate_gradients_are_what_they_are_called():
    """pᵀHp, p·p and r·r of each step, and a solution whose residual is r."""
    generator = torch.Generator().manual_seed(4)
    root, c = (torch.randn(*shape, generator=generator) for shape in ((6, 6), (6,)))
    h = root @ root.t() + torch.eye(6)
    directions = []

    def product(vector):
        directions.append(vector[0])
        return [h @ vector[0]]

    (found,), rows = mlo.ConjugateGradient(max_steps=4).recurrence().run(product, (c,), 4, ())
    for p, (curvature, squared, _) in zip(directions, rows, strict=True):
        torch.testing.assert_close(curvature, p @ h @ p)
        torch.testing.assert_close(squared, p @ p)
    torch.testing.assert_close(rows[-1][-1], (c - h @ found).square().sum())


class Sums(mlo.Problem):
    """Whose gradients are a number that is expanded, and one tensor twice."""

    def training_step(self, batch):
        a, b, c = self.params.values()
        return a.sum() + (batch * (b + c)).sum()


def test_gradients_have_memory_of_their_own_in_the_layout_of_their_parameters():
    """As autograd leaves them: clipping, optimizers and users write to them in place."""
    module = nn.ParameterDict({name: torch.ones(3, 4).t() for name in "abc"})
    batch = torch.arange(12.0).view(4, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    engine = mlo.Engine([Sums("sums", module, optimizer=optimizer, data=[batch], grad_clip=1.0, compile=CAPTURED)])
    length = math.sqrt(12 + 2 * batch.square().sum().item())
    for _ in range(3):
        assert engine.step()["sums"].gradient_norm == pytest.approx(length)
    for p, expected in zip(module.values(), (torch.ones(4, 3), batch, batch), strict=True):
        assert p.grad.stride() == p.stride()
        torch.testing.assert_close(p.grad, expected / length)


KINDS = {traced_sweep._total_gradient: "whole", traced_sweep._pullback: "pullback"}


@pytest.fixture
def derivatives(monkeypatch):
    """What the compiled losses were asked for in methods, one after the other."""
    asked = []
    call = compiled_loss.CompiledLoss.__call__

    def watched(self, function, batch, wanted):
        kind = KINDS.get(wanted.traced, "one pass")
        training = any(isinstance(t, nn.Parameter) for t in wanted.arguments[0])
        if kind != "one pass" or (function.__self__.name == "network" and not training):
            asked.append(kind)
        return call(self, function, batch, wanted)

    monkeypatch.setattr(compiled_loss.CompiledLoss, "__call__", watched)
    return asked


both_ways = pytest.mark.parametrize("kind", ["whole", "pullback"])


def solved(problem=Network, *, method=FIRST_ORDER["fd"], evaluations=6, compiled=CAPTURED, **options):
    """Return hypergradients at the beginning, at which nothing but the evaluations goes on."""
    engine = engine_of(compiled, method, problem=problem, **options)
    torch.manual_seed(3)
    for p in engine.problems["network"].module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return [engine.hypergradient("weights")["logit"] for _ in range(evaluations)]


@both_ways
def test_both_sides_of_a_difference_are_one_function(kind, derivatives):
    found, expected = solved(whole=kind == "whole"), solved(compiled=False)
    assert derivatives
    assert set(derivatives) == {kind}
    assert_same(found, expected)


class Shifted(nn.Module):
    """A layer that does little."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(0, 1, 6))

    def forward(self, x):
        return x + self.shift


class Wide(nn.Module):
    """Many entries in one parameter."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(0, 1, 6 * 4096).view(-1, 6))

    def forward(self, x):
        return x + self.shift.mean(0)


class HasFunction(Network):
    """A loss with a `torch.autograd.Function`, of which torch compiles a first derivative alone."""

    def training_step(self, batch):
        x, y = batch
        weights = self.deps.weights.params["logit"].sigmoid()
        return (Doubled.apply(weights) * F.cross_entropy(self(x), y, reduction="none")).mean()


class DrawsLate(Network):
    """A loss that begins to draw numbers when it has been compiled without."""

    noise = False

    def training_step(self, batch):
        x, y = batch
        return super().training_step((F.dropout(x, 0.5) if self.noise else x, y))


SINGLE_SIDES = {
    "random draws": {"layers": (lambda: nn.Dropout(0.5),)},
    "buffers": {"layers": (lambda: nn.BatchNorm1d(6),)},
    "several batches": {"accumulate": 2, "solve_batches": 3},
    "many parameters": {"layers": (Shifted,) * 13},
    "many entries": {"layers": (Wide,)},
    "a function": {"problem": HasFunction},
}


@both_ways
@pytest.mark.parametrize("variant", SINGLE_SIDES)
def test_the_sides_are_evaluated_one_after_the_other_where_they_cannot_be_one_function(variant, kind, derivatives):
    options = {**SINGLE_SIDES[variant], "whole": kind == "whole"}
    found, expected = solved(**options), solved(compiled=False, **options)
    assert derivatives.count("whole") <= (kind == "whole")  # it may be a trial that finds out
    assert derivatives.count("pullback") <= 1
    assert derivatives.count("one pass") > 1
    assert_same(found, expected)


@both_ways
def test_draws_that_begin_late_are_noticed(kind, derivatives):
    found = []
    for compiled in (CAPTURED, False):
        engine = engine_of(compiled, mlo.FiniteDifference(), problem=DrawsLate, whole=kind == "whole")
        for i in range(12):
            engine.problems["network"].noise = i >= 8
            found.append(engine.hypergradient("weights")["logit"])
    assert_same(found[:12], found[12:])
    last = len(derivatives) - derivatives[::-1].index(kind)
    assert "one pass" in derivatives[last:]
    assert derivatives[last:].count("pullback") <= 1


@both_ways
def test_draws_are_noticed_after_an_evaluation_that_failed(kind):
    """The one in which the function with the draws was compiled."""

    class Fails(DrawsLate):
        def training_step(self, batch):
            found = super().training_step(batch)
            return {**found, "loss": found["loss"] * self.factor}

    found = []
    for compiled in (CAPTURED, False):
        engine = engine_of(compiled, mlo.FiniteDifference(), problem=Fails, whole=kind == "whole")
        problem = engine.problems["network"]
        problem.factor = torch.ones(())
        for _ in range(5):
            engine.hypergradient("weights")
        problem.noise = True
        problem.factor.fill_(math.nan)
        with pytest.raises(mlo.LossError):
            engine.hypergradient("weights")
        problem.factor.fill_(1.0)
        found.append([engine.hypergradient("weights")["logit"] for _ in range(4)])
    assert_same(*found)


@both_ways
@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_draws_are_noticed_where_torch_was_told_not_to_compile(stance, kind):
    with torch.compiler.set_stance(stance):
        found = solved(layers=(lambda: nn.Dropout(0.5),), whole=kind == "whole")
    assert_same(found, solved(compiled=False, layers=(lambda: nn.Dropout(0.5),)))


@both_ways
def test_both_sides_stay_one_function_after_an_exception_of_the_loss(kind, derivatives):
    class Fails(Network):
        fails = False

        def training_step(self, batch):
            if self.fails:
                raise ValueError("the data is gone")
            return super().training_step(batch)

    engine = engine_of(CAPTURED, mlo.FiniteDifference(), problem=Fails, whole=kind == "whole")
    for i in range(8):
        engine.problems["network"].fails = i == 5
        if i == 5:
            with pytest.raises(ValueError, match="the data is gone"):
                engine.hypergradient("weights")
        else:
            engine.hypergradient("weights")
    assert derivatives[-1] == kind


@both_ways
def test_a_loss_that_is_not_finite_on_the_other_side_is_an_error(kind):
    class Lower(mlo.Problem):
        far = False

        def training_step(self, batch):
            w, x = self.params["w"], self.deps.upper.params["x"]
            wall = torch.where(w < 0.99, math.inf, 0.0) if self.far else 0.0
            return (w.square() - 2 * w * x + wall).sum()

    class Upper(mlo.Problem):
        def training_step(self, batch):
            return self.deps.lower.params["w"].square().sum()

    modules = [nn.ParameterDict({name: torch.ones(1)}) for name in "wx"]
    method = mlo.FiniteDifference(scale=0.5, epsilon=0.1)
    lower = Lower("lower", modules[0], depends_on=["upper"], hypergradient=method, compile=CAPTURED)
    upper = Upper("upper", modules[1], depends_on=["lower"], compile=CAPTURED if kind == "whole" else None)
    engine = mlo.Engine([lower, upper])
    for _ in range(5):
        assert engine.hypergradient("upper")["x"].item() == pytest.approx(2, rel=1e-9)
    lower.far = True
    with pytest.raises(mlo.LossError, match="returned inf"):
        engine.hypergradient("upper")


@both_ways
@pytest.mark.parametrize("method", WHOLE_SOLVES)
def test_a_solve_of_known_length_is_one_function(method, kind, derivatives):
    found, expected = (
        solved(method=WHOLE_SOLVES[method], compiled=c, whole=kind == "whole") for c in (CAPTURED, False)
    )
    assert derivatives == [kind] * 3  # evaluations 3, 5 and 6
    assert_same(found, expected)


class Bowl(mlo.Problem):
    """½ Σ hᵢ(wᵢ − xᵢ)² with curvatures that may change; the mixed derivative is −diag h."""

    curvatures = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)

    def training_step(self, batch):
        w, x = self.params["w"], self.deps.upper.params["x"]
        return 0.5 * (self.curvatures.to(w) * (w - x).square()).sum()


class Cubes(mlo.Problem):
    def training_step(self, batch):
        return self.deps.lower.params["w"].pow(3).sum()


def bowl(method, compiled=CAPTURED, dtype=torch.float64, lower=Bowl, whole=True, **options):
    x = torch.tensor([1.0, -2.0, 3.0], dtype=dtype)
    low, top = nn.ParameterDict({"w": x.clone()}), nn.ParameterDict({"x": x.clone()})
    if "optimizer" in options:
        options["optimizer"] = options["optimizer"](low.parameters())
    sgd = torch.optim.SGD(top.parameters(), lr=0.0)
    upper = Cubes("upper", top, depends_on=["lower"], optimizer=sgd, compile=compiled if whole else None)
    return mlo.Engine(
        [lower("lower", low, depends_on=["upper"], hypergradient=method, compile=compiled, **options), upper]
    )


def hypergradients(engine, count=6):
    return [engine.hypergradient("upper")["x"] for _ in range(count)]


@both_ways
def test_compiled_solves_are_those_of_the_closed_form(kind, derivatives):
    """With c = 3w² the hypergradient is Hλ: c itself after as many steps as eigenvalues, and (1 − (1 − sH)^K) c."""
    h, c = Bowl.curvatures, 3 * torch.tensor([1.0, 4.0, 9.0])
    for method, expected in (
        (mlo.Identity(scale=0.2), 0.2 * h * c),
        (mlo.FiniteDifference(scale=0.2), 0.2 * h * c),
        (mlo.ConjugateGradient(max_steps=3, rtol=0), c),
        (mlo.ConjugateGradient(max_steps=3, rtol=0, damping=0.5), h / (h + 0.5) * c),
        (mlo.Neumann(terms=5, scale=0.2), (1 - (1 - 0.2 * h) ** 5) * c),
    ):
        tolerance = 1e-9 if isinstance(method, mlo.FiniteDifference) else 1e-12
        for found in hypergradients(bowl(method, whole=kind == "whole")):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    assert derivatives == [kind] * 15


def test_weight_decay_of_the_optimizer_is_in_the_hessian_of_a_compiled_solve():
    h, c, decay = Bowl.curvatures, 3 * torch.tensor([1.0, 4.0, 9.0]), 0.25
    engine = bowl(
        mlo.ConjugateGradient(max_steps=3, rtol=0),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=decay),
    )
    for found in hypergradients(engine):
        torch.testing.assert_close(found, h / (h + decay) * c, rtol=1e-12, atol=0)


def test_single_precision_and_learning_rates_that_change():
    engine = bowl(mlo.Neumann(terms=3, rtol=0), dtype=torch.float32, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for i in range(1, 10):
        engine.problems["lower"].optimizer.param_groups[0]["lr"] = 0.02 * i
        (found,) = hypergradients(engine, 1)
        expected = (1 - (1 - 0.02 * i * Bowl.curvatures) ** 3) * 3 * torch.tensor([1.0, 4.0, 9.0])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


class Dot(mlo.Problem):
    """A parameter without dimensions and one with."""

    def training_step(self, batch):
        x = self.deps.upper.params["x"].sum()
        return (2 * (self.params["a"] - x).square() + (self.params["b"].double() - x).square().sum()).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_without_dimensions_and_of_several_precisions(dtype):
    def hypergradient(compiled, method):
        low = nn.ParameterDict({"a": torch.tensor(0.5, dtype=dtype), "b": torch.ones(3, dtype=dtype)})
        top = nn.ParameterDict({"x": torch.ones(2)})

        class Reads(mlo.Problem):
            def training_step(self, batch):
                return self.deps.lower.params["a"].pow(2) + self.deps.lower.params["b"].double().pow(2).sum()

        lower = Dot("lower", low, depends_on=["upper"], hypergradient=method, compile=compiled)
        engine = mlo.Engine([lower, Reads("upper", top, depends_on=["lower"])])
        found = hypergradients(engine)[-1]
        if compiled:  # and torch has not refused
            assert engine._sweeps["upper"].pullbacks["lower"]._left == compiled_sweep.ATTEMPTS
        return found

    for method in (
        mlo.ConjugateGradient(max_steps=1, rtol=0),
        mlo.Neumann(terms=3, scale=0.1),
        mlo.FiniteDifference(scale=0.1, epsilon=0.25),
    )[: 2 if dtype is torch.bfloat16 else 3]:
        found, expected = hypergradient(CAPTURED, method), hypergradient(False, method)
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


#: Solves that something ends early: the curvatures, the method and the status.
ENDED = {
    "negative curvature": ([1.0, -2.0, 4.0], mlo.ConjugateGradient(max_steps=3, rtol=0), "NEGATIVE_CURVATURE"),
    "no curvature": ([1.0, 0.0, 0.0], mlo.ConjugateGradient(max_steps=3, rtol=0), "SINGULAR"),
    "converged": ([2.0, 2.0, 2.0], mlo.ConjugateGradient(max_steps=3), "CONVERGED"),
    "converged well enough": ([2.0, 2.01, 2.02], mlo.ConjugateGradient(max_steps=3, rtol=0.02), "CONVERGED"),
    "a sum that grows": ([1.0, 2.0, 30.0], mlo.Neumann(terms=4, scale=0.1), "DIVERGED"),
    "a sum that converges": ([2.0, 2.0, 2.0], mlo.Neumann(terms=4, scale=0.5), "CONVERGED"),
}


@both_ways
@pytest.mark.parametrize("case", ENDED)
@pytest.mark.filterwarnings("ignore::mlo.BreakdownWarning")
def test_a_solve_that_something_ends_early_is_made_anew(case, kind, monkeypatch, derivatives):
    """And is compiled no more once that has happened time after time."""
    curvatures, method, status = ENDED[case]
    monkeypatch.setattr(Bowl, "curvatures", torch.tensor([1.0, 2.0, 4.0]))
    outcomes = []
    for compiled in (CAPTURED, False):
        engine = bowl(method, compiled, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), whole=kind == "whole")
        for i in range(32):
            if i == 6:
                monkeypatch.setattr(Bowl, "curvatures", torch.tensor(curvatures))
            report = engine.step()["upper"]
            solve = report.solves["upper/lower"]
            numbers = (report.gradient_norm, solve.worst_residual, solve.gradient_norm)
            outcomes.append((*solve.statuses, solve.iterations, solve.products, *[round(n, 9) for n in numbers]))
        monkeypatch.setattr(Bowl, "curvatures", torch.tensor([1.0, 2.0, 4.0]))
    assert outcomes[:32] == outcomes[32:]
    assert outcomes[10][0] is mlo.Status[status]
    assert derivatives.count(kind) == 3 + compiled_sweep.ATTEMPTS  # the first are at steps 3, 5 and 6
    assert derivatives.count("pullback") == (3 if kind == "pullback" else 0) + compiled_sweep.ATTEMPTS


NOT_WHOLE = {
    "a warm start": {"method": mlo.ConjugateGradient(max_steps=3, warm_start=True)},
    "a preconditioner": {"method": mlo.ConjugateGradient(max_steps=3, preconditioner=mlo.Nystrom(rank=2, damping=0.1))},
    "a method of one's own": {"method": type("Mine", (mlo.ConjugateGradient,), {})(max_steps=3)},
    "other products": {"method": mlo.ConjugateGradient(max_steps=3, product=mlo.ForwardOverReverse())},
    "too many steps": {"method": mlo.ConjugateGradient(max_steps=21, rtol=0)},
    "too many parameters": {"method": mlo.ConjugateGradient(max_steps=20, rtol=0), "layers": (Shifted,) * 3},
    "no number of terms": {"method": mlo.Neumann(terms=None, scale="auto", rtol=0.5)},
    "a scale to be found": {"method": mlo.Neumann(terms=3, scale="auto")},
    "several batches": {"method": WHOLE_SOLVES["cg"], "solve_batches": 2},
    "a function": {"method": WHOLE_SOLVES["cg"], "problem": HasFunction},
}


@both_ways
@pytest.mark.parametrize("case", NOT_WHOLE)
@pytest.mark.filterwarnings("ignore::mlo.BreakdownWarning")
def test_other_solves_are_what_they_are_without(case, kind, derivatives):
    options = {**NOT_WHOLE[case], "whole": kind == "whole"}
    found, expected = (solved(compiled=c, evaluations=18, **options) for c in (CAPTURED, False))
    tried = case == "a function"  # only torch says that it has no second derivative
    assert derivatives.count("whole") == (tried and kind == "whole")
    assert derivatives.count("pullback") == tried
    assert_same(found, expected)


class Lines(mlo.Problem):
    """Of one parameter the loss is linear, of another the second derivative is sparse."""

    def training_step(self, batch):
        w, x = self.params, self.deps.upper.params["x"]
        rows = F.embedding(torch.tensor([0, 2, 2]), w["c"], sparse=self.sparse)
        return (w["a"] - x).square().sum() + 2 * w["b"].sum() + (rows - x[:2]).square().sum()


class Squares(mlo.Problem):
    def training_step(self, batch):
        return sum(p.square().sum() for p in self.deps.lower.params.values())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("stance", ["default", "force_eager", "eager_on_recompile"])
@pytest.mark.parametrize(
    "method", [mlo.Neumann(terms=3, scale=0.1), mlo.ConjugateGradient(max_steps=2, rtol=0, damping=1.0)], ids=str
)
def test_solves_of_stages_with_parameters_of_no_curvature_or_with_sparse_gradients(method, stance, sparse):
    found = []
    for compiled in (CAPTURED, False):
        low = nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(4, 2)})
        top = nn.ParameterDict({"x": torch.linspace(0, 2, 3)})
        lower = Lines("lower", low, depends_on=["upper"], hypergradient=method, compile=compiled)
        lower.sparse = sparse
        engine = mlo.Engine([lower, Squares("upper", top, depends_on=["lower"])])
        with torch.compiler.set_stance(stance):
            found.append(hypergradients(engine))
        if compiled and stance == "default" and not sparse:
            assert engine._sweeps["upper"].pullbacks["lower"]._left == compiled_sweep.ATTEMPTS
    assert_same(*found)


def test_learning_rates_that_half_precision_cannot_hold():
    """A factor is rounded with its product, not before."""
    found = []
    for compiled in (CAPTURED, False):
        engine = bowl(
            mlo.Neumann(terms=4, rtol=0),
            compiled,
            dtype=torch.float16,
            lower=HalfBowl,
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-6),
        )
        found.append(hypergradients(engine)[-1])
    torch.testing.assert_close(*found, rtol=3 * torch.finfo(torch.float16).eps, atol=0)


class HalfBowl(Bowl):
    def training_step(self, batch):
        w, x = self.params["w"].float(), self.deps.upper.params["x"].float()
        return 50 * (w - x).square().sum()


@pytest.mark.parametrize("method", ["cg", "neumann"])
@pytest.mark.filterwarnings("ignore::mlo.BreakdownWarning")
def test_solves_of_a_stage_that_maximises(method, derivatives):
    found = []
    for compiled in (CAPTURED, False):
        engine = engine_of(compiled, WHOLE_SOLVES[method])
        engine.problems["network"].optimizer.param_groups[0]["maximize"] = True
        found.append([engine.hypergradient("weights")["logit"] for _ in range(6)])
    assert set(derivatives) <= {"one pass"}
    assert_same(*found)


@both_ways
@pytest.mark.parametrize("method", ["cg", "fd"])
def test_evaluations_in_methods_are_checked_as_often_as_without(method, kind, monkeypatch):
    checked = []
    reject = evaluation.Evaluation.reject_bypasses

    def watched(self, member, loss, own_parameters):
        checked.append(member.name)
        return reject(self, member, loss, own_parameters)

    monkeypatch.setattr(evaluation.Evaluation, "reject_bypasses", watched)
    solved(method={**FIRST_ORDER, **WHOLE_SOLVES}[method], evaluations=20, whole=kind == "whole")
    with_compiled = checked.count("network")
    checked.clear()
    solved(method={**FIRST_ORDER, **WHOLE_SOLVES}[method], evaluations=20, compiled=False)
    assert with_compiled == checked.count("network") > 0


@both_ways
def test_a_stage_with_a_parameter_that_the_loss_does_not_reach(kind, derivatives):
    class Partial(Network):
        def training_step(self, batch):
            x, y = batch
            weights = self.deps.weights.params["logit"].sigmoid()
            return (weights * F.cross_entropy(self.module[:2](x)[:, :3], y, reduction="none")).mean()

    options = {"problem": Partial, "method": WHOLE_SOLVES["cg"], "whole": kind == "whole"}
    found, expected = (solved(compiled=c, **options) for c in (CAPTURED, False))
    assert derivatives[: derivatives.count(kind)] == [kind]
    assert derivatives.count("pullback") == 1
    assert_same(found, expected)


def test_each_kind_of_evaluation_is_compiled_once():
    """Training of the lower problem, and the upper problem's gradient with both sides of the difference."""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    engine_of(CAPTURED, mlo.FiniteDifference()).run(20)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 2


def test_shapes_of_other_problems_and_evaluations_are_not_taken_for_changing_ones():
    """Torch would compile for any shape, which takes longer to compile and to run."""
    sizes = []

    def backend(graph, inputs):
        sizes.extend(i for i in inputs if isinstance(i, int | torch.SymInt))
        return graph.forward

    engine = engine_of({"backend": backend}, mlo.FiniteDifference())
    engine.problems["weights"].data[:] = [(x[:7], y[:7]) for x, y in engine.problems["weights"].data]
    engine.run(12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert sizes == []


class Pair(mlo.Problem):
    """A stage and an upper problem with as many parameters of as many dimensions."""

    depends = True

    def training_step(self, batch):
        w, x = self.params["weight"], self.deps.upper.params["weight"]
        return w.square().sum() - (w @ x.t()).sum() if self.depends else x.square().sum()


class Above(mlo.Problem):
    def training_step(self, batch):
        return self.deps.lower.params["weight"].pow(2).sum()


def pair(compiled, method, sparse=False):
    torch.manual_seed(5)
    low, top = nn.Embedding(3, 2), nn.Embedding(4, 2, sparse=sparse)
    sgd = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (low, top)]
    lower = Pair("lower", low, optimizer=sgd[0], depends_on=["upper"], hypergradient=method, compile=compiled)
    return mlo.Engine([lower, Above("upper", top, optimizer=sgd[1], depends_on=["lower"])])


def test_shapes_of_several_derivatives_are_not_taken_for_one_that_changes():
    sizes = []

    def backend(graph, inputs):
        sizes.extend(i for i in inputs if isinstance(i, int | torch.SymInt))
        return graph.forward

    compiled = compiled_loss.CompiledLoss("the loss", {"backend": backend})
    for rows in (2, 3, 4):
        at = torch.ones(rows, 2, requires_grad=True)
        _, (gradient,), _ = compiled(lambda x, at=at: (x * at).sum(), torch.ones(1), traced.gradient((at,)))
        torch.testing.assert_close(gradient, torch.ones(rows, 2))
    assert sizes == []


def test_a_stage_that_no_longer_reaches_its_parameters_is_an_error():
    engine = pair(CAPTURED, mlo.Identity(scale=0.5))
    for _ in range(5):
        engine.hypergradient("upper")
    engine.problems["lower"].depends = False
    with pytest.raises(mlo.LossError, match=r"problem 'lower'.*does not depend on any"):
        engine.hypergradient("upper")


class Looked(mlo.Problem):
    def training_step(self, batch):
        w, x = self.params["weight"], self.deps.upper(torch.tensor([0, 2, 2]))
        return (w.square() - w * x).sum()


def test_sparse_gradients_in_the_upper_parameters():
    def hypergradient(compiled):
        engine = pair(compiled, mlo.FiniteDifference(scale=0.5), sparse=True)
        looked = Looked(
            "lower",
            engine.problems["lower"].module,
            depends_on=["upper"],
            hypergradient=mlo.FiniteDifference(scale=0.5),
            compile=compiled,
        )
        engine = mlo.Engine([looked, engine.problems["upper"]])
        return [engine.hypergradient("upper")["weight"] for _ in range(6)][-1]

    torch.testing.assert_close(hypergradient(CAPTURED), hypergradient(False), rtol=1e-9, atol=1e-12)


def test_a_number_that_changes_from_step_to_step_is_not_taken_for_a_constant():
    found = []
    for compiled in (False, CAPTURED):
        engine = engine_of(compiled, mlo.FiniteDifference())
        for i in range(8):
            engine.problems["network"].temperature = 1 + 0.3 * i
            engine.step()
        found.append(trained(engine, steps=1))
    assert_same(*found)


class Alone(mlo.Problem):
    def training_step(self, batch):
        return self(batch).square().mean()


def test_hooks_of_modules_that_are_registered_later_are_run():
    def after_a_hook(compiled, register):
        engine = engine_of(compiled, mlo.Identity(scale=None))
        engine.run(5)
        handle = register(engine.problems["network"].module[0])
        try:
            return trained(engine, steps=5)
        finally:
            handle.remove()

    def halve(module, inputs, output):
        return 0.5 * output if isinstance(module, nn.Linear) else None

    for register in (lambda m: m.register_forward_hook(halve), lambda _: register_module_forward_hook(halve)):
        assert_same(after_a_hook(CAPTURED, register), after_a_hook(False, register))


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * ctx.saved_tensors[0].cos()


class WithFunction(Network):
    def training_step(self, batch):
        logit = self.deps.weights.params["logit"].sum()
        return super().training_step(batch)["loss"] + Sine.apply(logit * self.params["0.weight"]).mean()


def test_second_derivatives_of_functions_are_left_to_autograd():
    """Torch's compiler takes what a backward method returns for a constant."""
    eager = trained(engine_of(False, mlo.Identity(scale=None), problem=WithFunction))
    engine = engine_of(CAPTURED, mlo.Identity(scale=None), problem=WithFunction)
    with pytest.warns(mlo.MloWarning, match=r"second derivative of a torch\.autograd\.Function"):
        assert_same(trained(engine), eager)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mlo.MloWarning)  # first derivatives are right
        found = trained(engine_of(CAPTURED, mlo.FiniteDifference(), problem=WithFunction))
    assert_same(found, trained(engine_of(False, mlo.FiniteDifference(), problem=WithFunction)))


class Changing(mlo.Problem):
    """Returns something else at its third evaluation, the first that is compiled."""

    count, other = 0, None

    def training_step(self, batch):
        return self.other(self) if batch else self.params["w"].square().sum()


def raising(_):
    raise ValueError("a fault of the user's")


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda _: 1.0, mlo.LossError, "returned float"),
        (lambda _: {"los": 1.0}, mlo.LossError, "expected the key 'loss'"),
        (lambda p: p.params["w"], mlo.LossError, "shape"),
        (lambda _: torch.zeros(()), mlo.LossError, "without a graph"),
        (raising, ValueError, "user's"),
    ],
)
def test_what_a_loss_must_not_return_is_the_same_error_as_in_eager_code(other, error, message):
    module = nn.ParameterDict({"w": torch.ones(3)})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    problem = Changing("changing", module, optimizer=optimizer, data=[0, 0, 1], compile=CAPTURED)
    problem.other = other
    engine = mlo.Engine([problem])
    engine.run(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mlo.MloWarning)  # it is not torch that objects
        with pytest.raises(error, match=message):
            engine.step()


class Embedded(mlo.Problem):
    def training_step(self, batch):
        return self(batch).square().sum()


def test_sparse_gradients_stay_what_they_are():
    def weights(compiled):
        torch.manual_seed(4)
        module = nn.Embedding(6, 2, sparse=True)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        data = [torch.tensor([0, 2, 2])]
        mlo.Engine([Embedded("embedded", module, optimizer=optimizer, data=data, compile=compiled)]).run(6)
        return module.weight.detach()

    torch.testing.assert_close(weights(CAPTURED), weights(False), rtol=1e-12, atol=0)


def doubled(parameter):
    parameter.grad.mul_(2)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_are_run(kind):
    def weights(compiled):
        torch.manual_seed(3)
        module = nn.Linear(3, 2)
        getattr(module.weight, kind)(torch.neg if kind == "register_hook" else doubled)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        mlo.Engine([Alone("alone", module, optimizer=optimizer, data=[torch.ones(4, 3)], compile=compiled)]).run(5)
        return module.weight.detach()

    torch.testing.assert_close(weights(CAPTURED), weights(False), rtol=1e-12, atol=0)


class Prints(Network):
    def training_step(self, batch):
        print(end="")
        return super().training_step(batch)


@pytest.mark.parametrize("method", ["fd", "identity"])
def test_what_torch_cannot_compile_is_run_as_it_is_with_one_warning(method):
    eager = trained(engine_of(False, FIRST_ORDER[method]))
    engine = engine_of(CAPTURED, FIRST_ORDER[method], problem=Prints)
    with pytest.warns(mlo.MloWarning, match=r"problem 'network': training_step.*print.*test_compiled_loss") as caught:
        found = trained(engine)
    assert len([w for w in caught if issubclass(w.category, mlo.MloWarning)]) == 1
    assert_same(found, eager)


def test_a_loss_that_becomes_non_finite_is_an_error():
    engine = engine_of(CAPTURED, mlo.FiniteDifference())
    for _ in range(6):
        engine.step()
    engine.problems["network"].temperature = math.nan
    with pytest.raises(mlo.LossError, match="nan"):
        engine.step()


class NumpyNoise(Network):
    def training_step(self, batch):
        x, y = batch
        return super().training_step((x + 0.1 * torch.from_numpy(np.random.randn(10, 5)), y))


def test_random_numbers_of_numpy_are_its_own():
    """Torch would draw them from its own generator."""
    found = []
    for compiled in (CAPTURED, False):
        np.random.seed(3)
        engine = engine_of(compiled, mlo.FiniteDifference(), problem=NumpyNoise)
        if compiled:
            with pytest.warns(mlo.MloWarning, match="numpy"):
                found.append([*trained(engine), torch.tensor(np.random.rand())])
        else:
            found.append([*trained(engine), torch.tensor(np.random.rand())])
    assert_same(*found)


@pytest.mark.parametrize("way", ["config", "dispatch mode", "anomaly mode"])
def test_where_torch_compiles_nothing_for_a_while_the_loss_is_run_as_it_is(way):
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    engine, eager = (engine_of(c, mlo.FiniteDifference()) for c in (CAPTURED, False))
    around = {
        "config": lambda: torch._dynamo.config.patch(disable=True),
        "dispatch mode": Nothing,
        "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    }
    with around[way]():
        for _ in range(3):
            assert engine.step()["network"].metrics["compiled"] == 0
    reports = [engine.step() for _ in range(2)]
    assert reports[-1]["network"].metrics["compiled"] == 1
    assert_same(trained(engine), trained(eager, steps=17))


def test_settings_of_torch_that_make_constants_of_parameters_do_not_matter():
    with torch._dynamo.config.patch(install_free_tensors=True):
        assert_same(solved(), solved(compiled=False))
        assert torch._dynamo.config.install_free_tensors is True


def test_torch_is_left_as_it_was():
    engine = engine_of(CAPTURED, mlo.FiniteDifference())
    before = torch._dynamo.config.trace_autograd_ops
    for _ in range(4):
        engine.step()
    assert torch._dynamo.config.trace_autograd_ops is before


def test_a_problem_with_compiled_loss_can_be_copied():
    problem = engine_of(CAPTURED, mlo.FiniteDifference()).problems["network"]
    assert copy.deepcopy(problem).compile == problem.compile == CAPTURED


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("fast", "True, False, or a dict"),
        (1, "True, False, or a dict"),
        ({"speed": 2}, "arguments of torch.compile.*'speed'"),
        ({"fullgraph": False}, "fullgraph=True"),
        ({"mode": "reduce-overhead"}, "CUDA graphs"),
        ({"backend": "cudagraphs"}, "CUDA graphs"),
        ({"options": {"triton.cudagraphs": True}}, "CUDA graphs"),
        ({"mode": "fastest"}, "fastest"),
        ({"backend": "nonsense"}, "nonsense"),
        ({"options": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_options_that_cannot_be_are_refused(option, message):
    with pytest.raises(mlo.ConfigurationError, match=f"problem 'network', compile: (?s:.*){message}"):
        engine_of(option, mlo.FiniteDifference())


def test_options_are_those_of_torch_with_the_random_draws_of_eager_code():
    def options(given):
        return engine_of(given, mlo.FiniteDifference()).problems["network"].compile

    assert options(None) is options(False) is None
    assert options(True) == {"options": {"fallback_random": True, "triton.cudagraphs": False}}
    assert options({"mode": "max-autotune-no-cudagraphs", "dynamic": False}) == {
        "dynamic": False,
        "options": {
            **torch._inductor.list_mode_options("max-autotune-no-cudagraphs"),
            "fallback_random": True,
            "triton.cudagraphs": False,
        },
    }
    assert options({"options": {"fallback_random": False}})["options"]["fallback_random"] is False


def test_a_torch_that_cannot_is_named(monkeypatch):
    monkeypatch.setattr(compiled_loss, "_SWITCH", "no_such_switch")
    with pytest.raises(mlo.ConfigurationError, match=r"compile reverse passes.*got torch"):
        engine_of(True, mlo.FiniteDifference())


def test_no_warning_is_given_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error", mlo.MloWarning)
        trained(engine_of(CAPTURED, mlo.FiniteDifference()), steps=6)
