"""What real modules and careless users do: right, or an error that says what to do."""

import copy
import math
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mlo
from tests.levels import METHODS, Holder, Problem, pull, two_levels

# --- what is right -----------------------------------------------------------------------------------------------


def test_a_frozen_parameter_does_not_move_by_a_gradient_left_over():
    module = nn.ModuleDict({"a": Holder(1.0), "b": Holder(1.0)})
    problem = Problem("p", module, lambda p, _: sum(q.square().sum() for q in p.params.values()))
    engine = mlo.Engine([problem])
    engine.step()
    module["b"].w.requires_grad_(False)
    before = module["b"].w.clone()
    engine.run(2)
    assert torch.equal(module["b"].w, before)
    assert module["a"].w.item() == pytest.approx(0.8**3, abs=1e-15)


def test_an_autocast_region_around_several_steps_trains_on_present_weights():
    def fit(inside):
        torch.manual_seed(0)
        x = torch.randn(16, 8, dtype=torch.float32)
        y = x @ torch.ones(8, 1, dtype=torch.float32)

        def loss(p, _):
            with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
                return (p(x).float() - y).square().mean()

        module = nn.Linear(8, 1).float()
        engine = mlo.Engine([Problem("p", module, loss, lr=0.05, steps=5)])
        if inside:
            return engine.run(3)["p"].loss
        with torch.autocast("cpu", torch.bfloat16):
            found = engine.run(3)["p"].loss
            assert torch.is_autocast_cache_enabled(), "the caller's setting comes back"
        return found

    assert fit(inside=False) == fit(inside=True)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_an_upper_loss_that_is_flat_here_has_a_zero_gradient(method):
    """A hinge beyond its margin: zero cotangents, and no complaint."""
    engine = two_levels(top_loss=lambda p, _: F.relu(0.5 - p.deps.low.params["w"]).sum(), method=method)
    assert engine.hypergradient("top")["w"].tolist() == [0.0, 0.0]
    engine.step()


@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_warm_start_survives_freezing_and_unfreezing(frozen_first):
    module = nn.ModuleDict({"a": Holder(1.0, 2.0), "b": Holder(3.0, 4.0)})

    def low_loss(p, _):
        top = p.deps.top.params["w"]
        return sum(0.5 * (q - k * top).square().sum() for k, q in enumerate(p.params.values(), 1))

    engine = two_levels(
        low_loss,
        lambda p, _: sum(q.sum() for q in p.deps.low.params.values()),
        low=module,
        method=mlo.ConjugateGradient(warm_start=True),
    )
    for frozen in (frozen_first, not frozen_first):
        module["b"].w.requires_grad_(not frozen)
        engine.step()
        expected = 1.0 if frozen else 3.0
        assert engine.hypergradient("top")["w"].tolist() == pytest.approx([expected] * 2, abs=1e-10)


def test_a_chain_may_be_longer_than_the_recursion_limit():
    length = 1200

    def stage_loss(p, _):
        return 0.5 * (p.params["w"] - p.deps.before.params["w"]).square().sum()

    stages = [Problem("w0", Holder(1.0), pull, depends_on=["top"], hypergradient=mlo.Identity(scale=1.0))]
    for i in range(1, length):
        roles = {"before": f"w{i - 1}"}
        stages.append(
            Problem(f"w{i}", Holder(1.0), stage_loss, depends_on=roles, hypergradient=mlo.Identity(scale=1.0))
        )
    top = Problem(
        "top", Holder(1.0), lambda p, _: p.deps.last.params["w"].sum() * 2, depends_on={"last": f"w{length - 1}"}
    )
    engine = mlo.Engine([*stages, top])
    reports = engine.step()
    assert all(r.steps == 1 for r in reports.values())
    assert engine.hypergradient("top")["w"].item() == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_sparse_embeddings_at_a_lower_stage(method):
    table = nn.Embedding(4, 2, sparse=True)
    rows = torch.tensor([0, 1, 2, 3, 0])
    counts = torch.tensor([2.0, 1.0, 1.0, 1.0])

    def low_loss(p, _):
        return 0.5 * (p(rows) - p.deps.top.params["w"]).square().sum()

    engine = two_levels(low_loss, lambda p, _: p.deps.low(rows).sum(), low=table, method=method)
    # H = diag(counts), G = −counts, c = counts: the exact gradient is Σ counts; with H⁻¹ → ½ it is Σ ½ counts².
    exact = counts.sum().item()
    approximate = 0.5 * counts.square().sum().item()
    expected = approximate if isinstance(method, mlo.Identity | mlo.FiniteDifference) else exact
    assert engine.hypergradient("top")["w"].tolist() == pytest.approx([expected] * 2, rel=1e-7)


def test_dense_takes_parameters_of_any_memory_layout():
    conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    images = torch.randn(4, 2, 5, 5)

    def low_loss(p, _):
        return (p(images) - p.deps.top.params["w"].sum()).square().mean() + p.params["weight"].square().sum()

    def hypergradient(method):
        return two_levels(
            low_loss, lambda p, _: p.deps.low(images).square().mean(), low=conv, method=method
        ).hypergradient("top")["w"]

    torch.testing.assert_close(
        hypergradient(mlo.Dense()), hypergradient(mlo.ConjugateGradient()), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e20])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_cotangents_whose_squares_leave_the_range_of_float32(method, size):
    x = torch.ones(3, dtype=torch.float32, requires_grad=True)
    w = mlo.best_response(lambda w, x: (w - x).square().sum(), torch.ones(3, dtype=torch.float32), x, method)
    (found,) = torch.autograd.grad(size * w.sum(), x)  # H = 2, which all methods here invert
    assert (found.double() / size).tolist() == pytest.approx([1.0] * 3, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_differences_in_half_precision_are_right_to_a_few_per_cent(dtype):
    """On a quadratic the difference is exact but for rounding, if the shift is above the rounding of a weight."""
    torch.manual_seed(0)
    low, top = Holder(*torch.randn(500).tolist()).to(dtype), Holder(*torch.randn(500).tolist()).to(dtype)
    c = torch.randn(500).to(dtype)
    engine = two_levels(
        low=low,
        top=top,
        top_loss=lambda p, _: (c * p.deps.low.params["w"]).sum(),
        method=mlo.FiniteDifference(scale=0.5),
    )
    found = engine.hypergradient("top")["w"].double()
    assert ((found - 0.5 * c.double()).norm() / (0.5 * c.double()).norm()).item() < 0.05


def test_conjugate_gradients_say_that_a_hessian_is_singular_and_stay_bounded():
    torch.manual_seed(0)
    x, y, xv = torch.randn(5, 20), torch.randn(5), torch.randn(7, 20)
    for seed in range(8):
        torch.manual_seed(seed)
        engine = two_levels(
            lambda p, _: (x @ p.params["w"] - y * p.deps.top.params["w"]).square().mean(),
            lambda p, _: (xv @ p.deps.low.params["w"] - 1).square().mean(),
            low=Holder(*torch.randn(20).tolist()),
            top=Holder(1.0),
            method=mlo.ConjugateGradient(on_breakdown="raise"),
        )
        with pytest.raises(mlo.BreakdownError, match=r"SINGULAR.*damping"):
            engine.hypergradient("top")
    warned = two_levels(
        lambda p, _: (x @ p.params["w"] - y * p.deps.top.params["w"]).square().mean(),
        lambda p, _: (xv @ p.deps.low.params["w"] - 1).square().mean(),
        low=Holder(*torch.randn(20).tolist()),
        top=Holder(1.0),
        method=mlo.ConjugateGradient(),
    )
    with pytest.warns(mlo.BreakdownWarning, match=r"SINGULAR"):
        assert abs(warned.hypergradient("top")["w"].item()) < 1e3


def test_buffers_that_a_loss_makes_and_training_modes_that_it_sets_are_restored():
    class Averaging(Holder):
        def __init__(self, *values):
            super().__init__(*values)
            self.register_buffer("average", None)

    def low_loss(p, batch):
        p.module.average = p.params["w"].detach().clone()
        p.module.train()
        return pull(p, batch)

    module = Averaging(1.0, 2.0)
    engine = two_levels(low_loss, low=module, method=mlo.Identity(scale=0.5))
    module.eval()
    engine.hypergradient("top")
    assert module.average is None
    assert not module.training
    engine.step()
    kept = module.average.clone()
    engine.hypergradient("top")
    assert torch.equal(module.average, kept)


def test_problems_can_be_in_several_engines_one_after_the_other():
    low = Problem("low", Holder(1.0), lambda p, _: 0.5 * (p.params["w"] - p.deps.top.params["w"]).square().sum())
    low.depends_on = ["top"]

    def top(value):
        return Problem(
            "top", Holder(value), lambda p, _: (p.deps.low.params["w"] * p.params["w"]).sum(), depends_on=["low"]
        )

    first, second = mlo.Engine([low, top(3.0)]), None
    expected = first.hypergradient("top")["w"].item()
    second = mlo.Engine([low, top(5.0)])
    assert second.hypergradient("top")["w"].item() == pytest.approx(expected + 2, abs=1e-12)
    assert first.hypergradient("top")["w"].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_problems_can_be_copied_out_of_an_engine(duplicate):
    engine = two_levels(method=mlo.Neumann(terms=3, scale=0.5))
    for problem in engine.problems.values():
        problem.loss = None  # a lambda, which pickle refuses
        other = duplicate(problem)
        assert (other.name, dict(other.depends_on), other.hypergradient) == (
            problem.name,
            dict(problem.depends_on),
            problem.hypergradient,
        )
        assert torch.equal(other.module.w, problem.module.w)
        assert other.module.w is not problem.module.w
        with pytest.raises(mlo.DependencyError, match=r"before it is part of an engine"):
            _ = next(iter(other.depends_on)) and other.deps[next(iter(other.depends_on))]
    assert copy.deepcopy(engine.problems["low"].params).keys() == {"w"}


def test_options_may_be_numbers_of_numpy():
    problem = Problem("p", Holder(1.0), lambda p, _: p.params["w"].sum(), steps=np.int64(2), grad_clip=np.float32(0.5))
    assert (problem.steps, problem.grad_clip) == (2, 0.5)
    assert mlo.Neumann(terms=np.int64(3), scale=np.float32(0.5)).terms == 3


def test_what_lies_only_behind_a_problem_taken_as_given_is_not_read():
    def problem(name, reads, given=()):
        return Problem(name, Holder(1.0), lambda p, _: p.params["w"].sum(), depends_on=reads, constants=given)

    graph = mlo.Engine(
        [
            problem("base", ["top"]),
            problem("c", ["base"]),
            problem("d", ["c"]),
            problem("top", ["d"], given=["c"]),
        ]
    ).graph
    assert graph.responses("top") == ("d",)
    assert graph.responses("d") == ("base", "c")


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_reentrant_checkpoint_is_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(5, 3)

    def low_loss(p, _):
        out = checkpoint(p.module, x.clone().requires_grad_(), use_reentrant=True)
        return (out - p.deps.top.params["w"].sum()).square().mean() + p.params["2.weight"].square().sum()

    engine = two_levels(low_loss, lambda p, _: p.deps.low(x).square().mean(), low=net)
    with pytest.raises(mlo.EvaluationError, match=r"'low'.* uses .* use_reentrant=False"):
        engine.step()


@pytest.mark.parametrize("own", ["numpy", "torch"])
def test_a_generator_of_ones_own_is_refused_by_finite_differences(own):
    rng = np.random.default_rng(0) if own == "numpy" else torch.Generator().manual_seed(0)

    def low_loss(p, _):
        draw = rng.random() if own == "numpy" else torch.rand((), generator=rng)
        return (p.params["w"] - draw * p.deps.top.params["w"]).square().sum()

    engine = two_levels(low_loss, method=mlo.FiniteDifference(scale=0.5))
    with pytest.raises(mlo.EvaluationError, match=r"'low'.* and then .*global generators"):
        engine.hypergradient("top")


def test_a_loss_that_starts_to_draw_later_is_replayed():
    """The draws of NumPy's generator are replayed from the first one on, whenever it comes."""
    step = []

    def low_loss(p, _):
        draw = np.random.random() if len(step) >= 3 else 0.5
        return 0.5 * (p.params["w"] - (1 + draw) * p.deps.top.params["w"]).square().sum()

    engine = two_levels(
        low_loss, lambda p, _: p.deps.low.params["w"].sum(), method=mlo.FiniteDifference(scale=1.0), lr=1.0
    )
    for _ in range(6):
        step.append(None)
        engine.step()
        top, low = (engine.problems[n].module.w for n in ("top", "low"))
        with torch.no_grad():  # after a step of the lower at rate 1 it is (1 + draw)·top, before top's own step
            engine_top = top + 0.1 * engine.problems["top"].module.w.grad
        factor = (low / engine_top).tolist()
        assert engine.hypergradient("top")["w"].tolist() == pytest.approx(factor, rel=1e-6)


def test_a_batch_that_is_changed_in_place_is_refused():
    def low_loss(p, batch):
        batch["x"].sub_(1.0)
        return pull(p, batch)

    engine = two_levels(low_loss, data=[{"x": torch.ones(2)}])
    with pytest.raises(mlo.EvaluationError, match=r"'low'.* changed its batch in place.*clone"):
        engine.step()


def test_a_gradient_hook_on_a_parameter_with_an_indirect_gradient_is_refused():
    top = Holder(1.0, 2.0)
    top.w.register_hook(lambda g: g * torch.tensor([1.0, 0.0]))
    engine = two_levels(
        top=top, top_loss=lambda p, _: p.deps.low.params["w"].square().sum() + p.params["w"].square().sum()
    )
    with pytest.raises(mlo.EvaluationError, match=r"'w' of problem 'top' has a gradient hook.*register_step_pre_hook"):
        engine.step()


def test_a_loss_that_runs_its_own_backward_is_refused():
    def low_loss(p, batch):
        loss = pull(p, batch)
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(mlo.EvaluationError, match=r"'low' left a gradient.*calls no backward"):
        two_levels(low_loss).step()


@pytest.mark.parametrize("unfreeze", [True, False])
def test_a_bypass_that_begins_later_is_found(unfreeze):
    top = nn.ParameterDict({"w": torch.tensor([1.0, 2.0]), "late": torch.ones(2)})
    hidden = top["late"]  # a reference that no binding reaches
    calls = []

    def low_loss(p, _):
        calls.append(None)
        target = hidden if unfreeze or len(calls) > 20 else p.deps.top.params["late"].detach()
        return 0.5 * (p.params["w"] - p.deps.top.params["w"] - target).square().sum()

    top["late"].requires_grad_(not unfreeze)
    engine = two_levels(low_loss, top=top)
    engine.step()
    top["late"].requires_grad_(True)
    with pytest.raises(mlo.EvaluationError, match=r"reaches the parameter 'late' of problem 'top' past the engine"):
        engine.run(40)


@pytest.mark.parametrize(
    ("option", "value"),
    [("optimizer", None), ("data", [1]), ("hypergradient", mlo.Dense()), ("depends_on", ["top"]), ("constants", ())],
)
def test_a_definition_that_changes_under_an_engine_is_refused(option, value):
    engine = two_levels(data=[None])
    low = engine.problems["low"]
    setattr(low, option, torch.optim.SGD(low.module.parameters(), lr=0.5) if option == "optimizer" else value)
    if option == "constants":  # the same empty tuple
        engine.step()
        return
    with pytest.raises(mlo.ConfigurationError, match=f"'low', {option}: .*Build a new engine"):
        engine.step()
    mlo.Engine(list(engine.problems.values())).step()


@pytest.mark.parametrize(("option", "value"), [("steps", -3), ("accumulate", 0), ("grad_clip", -1.0), ("data", 7)])
def test_options_are_checked_whenever_they_are_set(option, value):
    low = two_levels().problems["low"]
    before = getattr(low, option)
    with pytest.raises(mlo.ConfigurationError, match=f"'low', {option}: expected"):
        setattr(low, option, value)
    assert getattr(low, option) is before


def test_a_tuple_of_tensors_is_no_sequence_of_batches():
    with pytest.raises(mlo.ConfigurationError, match=r"one batch of 2 tensors .* pass \[batch\]"):
        Problem("p", Holder(1.0), pull, data=(torch.ones(3), torch.ones(3)))


@pytest.mark.parametrize("name", ["params", "steps", "scheduler", "data"])
def test_a_method_with_a_reserved_name_is_refused(name):
    with pytest.raises(mlo.ConfigurationError, match=f"{name}: this name is reserved"):
        type("Bad", (mlo.Problem,), {name: lambda self: None})


def test_a_plateau_scheduler_without_validation_is_warned_of():
    class Validated(Problem):
        def validation_step(self):
            return 1.0

    module = Holder(1.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    engine = mlo.Engine(
        [Validated("p", module, lambda p, _: p.params["w"].square().sum(), optimizer=optimizer, scheduler=plateau)]
    )
    with pytest.warns(mlo.MloWarning, match=r"'p': its ReduceLROnPlateau.*validate_every"):
        engine.run(1)
    engine.run(1, validate_every=1)


class Broken(mlo.ImplicitMethod):
    """A solver of the user's own that returns what the test says."""

    result = None

    def solve(self, system):
        vector = {"short": (), "long": (*system.rhs, torch.ones(1)), "shape": (torch.ones(7),)}.get(type(self).result)
        if vector is None:
            return system.rhs
        return mlo.Solution(vector, mlo.Status.CONVERGED, 1, 0.0)


@pytest.mark.parametrize(
    ("result", "got"), [("short", r"\[\]"), ("long", r"\(1,\)\]"), ("shape", "7"), ("bare", "tuple")]
)
def test_what_a_solver_returns_is_checked(monkeypatch, result, got):
    monkeypatch.setattr(Broken, "result", result)
    with pytest.raises(mlo.ConfigurationError, match=f"Broken.solve at stage 'top/low': expected .*got .*{got}"):
        two_levels(method=Broken()).hypergradient("top")


def test_an_operation_without_second_derivative_is_named_with_the_way_out():
    q = torch.randn(1, 1, 4, 8, dtype=torch.float32)

    def low_loss(p, _):
        w = p.params["w"].float().reshape(1, 1, 1, 8)
        out = F.scaled_dot_product_attention(q * w, q, q)
        return out.square().sum() + (p.params["w"] - p.deps.top.params["w"]).square().sum()

    low, top = Holder(*[0.1] * 8), Holder(*[0.2] * 8)
    engine = two_levels(low_loss, low=low, top=top)
    with pytest.raises(mlo.EvaluationError, match=r"'low'.* second derivative that ConjugateGradient needs.*MATH"):
        engine.hypergradient("top")
    found = two_levels(low_loss, low=low, top=top, method=mlo.FiniteDifference(scale=0.5)).hypergradient("top")["w"]
    assert math.isfinite(found.norm().item())


def test_a_place_for_warm_starts_must_be_a_dictionary():
    with pytest.raises(mlo.ConfigurationError, match=r"expected a dictionary that you keep"):
        mlo.best_response(
            lambda w, x: (w - x).square().sum(),
            torch.ones(2),
            torch.ones(2, requires_grad=True),
            mlo.ConjugateGradient(warm_start=True),
            warm_starts=True,
        )


def test_a_squared_distance_of_numbers_is_refused():
    with pytest.raises(mlo.ConfigurationError, match=r"tensor 0 is float on the left"):
        mlo.squared_distance([1.0], [torch.ones(1)])


# --- what is warned of, and errors that point to the cause --------------------------------------------------------


def meta_weight_net(method, detached):
    """Weights that a network computes from the losses, as in Meta-Weight-Net; returns the engine."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20)
    model, net = nn.Linear(3, 1), nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def low_loss(p, _):
        losses = (p(x).squeeze(1) - y).square()
        given = losses.detach() if detached else losses
        weights = p.deps.top(given[:, None]).sigmoid().squeeze(1)
        return (weights * losses).mean() + 0.1 * sum(q.square().sum() for q in p.params.values())

    return two_levels(
        low_loss, lambda p, _: (p.deps.low(x).squeeze(1) - y).square().mean(), low=model, top=net, method=method
    )


def test_finite_differences_through_a_stop_gradient_are_warned_of_once():
    engine = meta_weight_net(mlo.FiniteDifference(), detached=True)
    engine.step()
    with pytest.warns(mlo.MloWarning, match=r"'top/low'.*'low': training_step.*stop-gradient.*Identity"):
        engine.step()
    engine.run(3)


@pytest.mark.parametrize("method", [mlo.FiniteDifference(), mlo.Identity(scale=None, product=mlo.CentralDifferences())])
def test_finite_differences_without_a_stop_gradient_are_not_warned_of(method):
    meta_weight_net(method, detached=False).run(4)


def test_double_backward_is_right_through_a_stop_gradient():
    engine = meta_weight_net(mlo.Identity(scale=None), detached=True)
    engine.run(3)
    low, top = (engine.problems[n].module for n in ("low", "top"))
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20)
    losses = (low(x).squeeze(1) - y).square()
    weights = top(losses.detach()[:, None]).sigmoid().squeeze(1)
    loss = (weights * losses).mean() + 0.1 * sum(q.square().sum() for q in low.parameters())
    inner = torch.autograd.grad(loss, list(low.parameters()), create_graph=True)
    outer = torch.autograd.grad((low(x).squeeze(1) - y).square().mean(), list(low.parameters()))
    expected = torch.autograd.grad(inner, list(top.parameters()), [-0.1 * c for c in outer])
    for found, right in zip(engine.hypergradient("top").values(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-14)


def test_a_response_that_the_loss_cuts_off_is_warned_of():
    engine = two_levels(
        top_loss=lambda p, _: p.deps.low.params["w"].detach().square().sum() + p.params["w"].square().sum()
    )
    with pytest.warns(mlo.UnusedDependencyWarning, match="'top' reads the response of 'low', but .*no gradient"):
        engine.step()


def test_an_engine_in_which_nothing_can_step_is_warned_of():
    engine = mlo.Engine([Problem("p", Holder(1.0), lambda p, _: p.params["w"].sum(), optimizer=None)])
    with pytest.warns(mlo.MloWarning, match="none of the problems has an optimizer"):
        engine.step()
    engine.step()


@pytest.mark.parametrize(
    ("low", "order", "hint"),
    [
        ({"reads": ["top"], "item": True}, 1, r"'low', whose loss must use 'top' differentiably \(no .item"),
        ({"reads": []}, 1, r"'low', whose solution does not depend on 'top' \(it needs depends_on='top'\)"),
        ({"reads": ["top"]}, -1, r"'low', which comes later and is taken as given \(lower problems come first"),
        ({"reads": ["top"], "method": mlo.StopGradient()}, 1, r"'low', whose StopGradient carries no gradient"),
    ],
)
def test_a_loss_without_gradient_names_the_problem_that_is_the_cause(low, order, hint):
    def low_loss(p, _):
        value = p.deps.top.params["w"] if low["reads"] else torch.ones(1)
        return (p.params["w"] - (value.sum().item() if low.get("item") else value)).square().sum()

    problems = [
        Problem("low", Holder(1.0), low_loss, depends_on=low["reads"], hypergradient=low.get("method")),
        Problem("top", Holder(1.0), lambda p, _: p.deps.low.params["w"].sum(), depends_on=["low"]),
    ]
    engine = mlo.Engine(problems[::order])
    with pytest.raises(mlo.LossError, match=hint):
        engine.hypergradient("top")


def test_a_data_set_is_no_sequence_of_batches():
    data = torch.utils.data.TensorDataset(torch.ones(4, 1), torch.ones(4))
    with pytest.raises(mlo.ConfigurationError, match=r"'p', data: .*wrap the data set in a DataLoader"):
        Problem("p", Holder(1.0), pull, data=data)
    Problem("p", Holder(1.0), pull, data=torch.utils.data.DataLoader(data, 2))


def test_a_view_says_how_to_reach_the_rest_of_a_module():
    engine = two_levels(lambda p, _: p.params["w"].sum() + p.deps.top.weight.sum())
    with pytest.raises(mlo.DependencyError, match=r"no attribute 'weight'.*\.params\['weight'\].*\.module\.weight"):
        engine.step()


@pytest.mark.parametrize("callbacks", [print, [None]])
def test_callbacks_must_be_functions(callbacks):
    with pytest.raises(mlo.ConfigurationError, match=r"callbacks=\[log\]"):
        two_levels().run(1, callbacks=callbacks)


def test_the_table_stays_narrow_when_a_problem_reads_many():
    names = [f"task_{i}" for i in range(12)]
    tasks = [Problem(n, Holder(1.0), pull, depends_on=["top"]) for n in names]
    top = Problem("top", Holder(1.0), lambda p, _: sum(p.deps[n].params["w"].sum() for n in names), depends_on=names)
    table = str(mlo.Engine([*tasks, top]).graph)
    assert max(map(len, table.splitlines())) < 130
    assert all(f"{n} (response)" in table for n in names)


def test_a_gradient_that_a_method_hands_out_twice_is_the_leaf_s_own():
    """Two parameters of one shape, and a method that gives one expanded tensor for both: clipping scales each once."""

    class Same(mlo.HypergradientMethod):
        def pullback(self, stage, cotangents, solution, inputs, needed):
            one = torch.ones((), dtype=torch.float64).expand(3)
            return tuple(one if n else None for n in needed)

    class Stage(mlo.Problem):
        def training_step(self, batch):
            pull = self.deps.top.params["a"] + self.deps.top.params["b"]
            return (self.params["w"] - pull).square().sum()

    class Top(mlo.Problem):
        def training_step(self, batch):
            return self.deps.low.params["w"].sum()

    low, top = (nn.ParameterDict({n: torch.zeros(3, dtype=torch.float64) for n in names}) for names in ("w", "ab"))
    sgd = torch.optim.SGD
    stage = Stage("low", low, optimizer=sgd(low.parameters(), lr=0.1), depends_on=["top"], hypergradient=Same())
    upper = Top("top", top, optimizer=sgd(top.parameters(), lr=1.0), depends_on=["low"], grad_clip=0.6**0.5)
    mlo.Engine([stage, upper]).step()
    for name in "ab":  # the norm of six ones is √6: each entry becomes √0.1
        torch.testing.assert_close(top[name], torch.full((3,), -(0.1**0.5), dtype=torch.float64), rtol=1e-5, atol=0)


# --- what a lean step must not lose ------------------------------------------------------------------------------


def test_layers_that_share_one_dictionary_of_parameters_keep_their_parameters():
    """`copy.copy` of a layer shares it: what is swapped in at one is what the other would find there."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 2, bias=False)
            self.second = copy.copy(self.first)

    net = Twice()
    weight = net.first.weight
    engine = two_levels(
        lambda p, _: (
            (p.module.second(p.module.first(torch.ones(2))) - p.deps.top.params["w"]).square().sum()
            + p.module.first.weight.square().sum()
        ),
        lambda p, _: p.deps.low.module.first.weight.square().sum(),
        low=net,
        method=mlo.Identity(scale=0.1),
    )
    for _ in range(2):
        engine.step()
        assert net.first.weight is net.second.weight is weight


@pytest.mark.parametrize("method", [mlo.ConjugateGradient(max_steps=1, rtol=0), mlo.Neumann(2, 0.3), mlo.GMRES(1)])
def test_a_cotangent_of_weights_that_the_stage_s_loss_does_not_reach(method):
    """They take no part in the system, whose right-hand side is shorter than the cotangent."""
    scales = torch.tensor([1.0, 3.0])
    found = []
    for share in (0.0, 10.0):
        module = Holder(1.0, 2.0)
        module.idle = nn.Parameter(torch.ones(3))
        engine = two_levels(
            lambda p, _: 0.5 * (scales * (p.params["w"] - p.deps.top.params["w"]).square()).sum(),
            lambda p, _, share=share: p.deps.low.params["w"].sum() + share * p.deps.low.params["idle"].sum(),
            low=module,
            method=method,
        )
        found.append(engine.hypergradient("top")["w"])
        assert torch.allclose(found[-1], found[0], rtol=1e-12)
    if isinstance(method, mlo.ConjugateGradient):  # c = (1, 1): one step of c·c / c·Hc = 1/2, and then G = −H
        assert torch.allclose(found[0], scales / 2, rtol=1e-12)


@pytest.mark.parametrize("method", [mlo.FiniteDifference(scale=0.5), mlo.Identity(scale=0.5)])
def test_replayed_draws_do_not_move_the_generators(method):
    """After a step they stand where the steps of the problems alone have left them."""

    def loss(p, _):
        noise = torch.rand(2) + torch.tensor(np.random.rand(2))
        others = [p.deps[name].params["w"] for name in p.deps]
        return ((p.params["w"] - noise) ** 2).sum() + sum((p.params["w"] * w).sum() for w in others)

    states = []
    for rule in (mlo.StopGradient(), method):
        torch.manual_seed(0)
        np.random.seed(0)
        two_levels(loss, loss, method=rule).run(3)
        states.append((torch.get_rng_state().tolist(), np.random.get_state()[2]))
    assert states[0] == states[1]


def test_a_module_that_holds_its_parent():
    parent = Holder(1.0, 2.0)
    parent.child = nn.Dropout()
    parent.child.parent = parent
    engine = two_levels(low=parent, method=mlo.Identity())
    parent.child.training = False
    engine.hypergradient("top")
    assert (parent.training, parent.child.training) == (True, False)


def test_training_modes_of_parts_that_were_replaced_are_restored():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.ReLU()))
    engine = two_levels(
        lambda p, _: (p(torch.ones(2)) - p.deps.top.params["w"]).square().sum(),
        lambda p, _: p.deps.low(torch.ones(2)).square().sum(),
        low=net,
        method=mlo.Identity(scale=0.1),
    )
    engine.step()
    net[1], net[2][0] = nn.Identity(), nn.Dropout()
    net[0].eval()
    modes = [part.training for part in net.modules()]
    assert modes.count(True) == 4
    engine.validate()
    assert [part.training for part in net.modules()] == modes


def test_definitions_are_checked_before_anything_is_taken_note_of():
    """Else what was frozen in between would have been noted, and not looked at again."""
    engine = two_levels(method=mlo.Identity())
    engine.step()
    low, top = engine.problems["low"], engine.problems["top"]
    low.module.w.requires_grad_(False)
    before, top.hypergradient = top.hypergradient, mlo.Identity()
    with pytest.raises(mlo.ConfigurationError, match="'top', hypergradient"):
        engine.step()
    top.hypergradient = before
    with pytest.raises(mlo.ConfigurationError, match="'low': expected at least one parameter with requires_grad"):
        engine.step()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_that_a_failing_loss_leaves_is_undone(enabled):
    def low_loss(p, _):
        torch.set_grad_enabled(not torch.is_grad_enabled())
        raise KeyError

    engine = two_levels(low_loss)
    with torch.set_grad_enabled(enabled):
        with pytest.raises(KeyError):
            engine.step()
        assert torch.is_grad_enabled() is enabled
