"""Bad input gets an error that names the problem, what was expected, what was got, and the remedy."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import mlo
from tests import zoo


def module():
    return nn.ParameterDict({"w": torch.ones(2)})


class Stage(mlo.Problem):
    """Pulls towards what it reads; `loss` can be replaced."""

    def __init__(self, name="a", m=None, **options):
        m = module() if m is None else m
        if "optimizer" not in options:
            options["optimizer"] = optim.SGD(m.parameters(), lr=0.1)
        super().__init__(name, m, **options)

    def training_step(self, batch):
        w = self.params["w"]
        return w.square().sum() + sum((w - self.deps[d].params["w"]).square().sum() for d in self.depends_on)


def step_with(loss, **options):
    problem = Stage(**options)
    problem.training_step = lambda batch: loss(problem, batch)
    return mlo.Engine([problem]).step()


# --- the problem -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "two words", "1st", "stage-1", "class", None, 3, "a.b"])
def test_illegal_names(name):
    with pytest.raises(mlo.ConfigurationError, match=r"expected a Python identifier such as 'stage_1'"):
        Stage(name)


def adam_of_other_parameters():
    return optim.Adam(module().parameters())


def scheduler_of_another_optimizer():
    return optim.lr_scheduler.StepLR(adam_of_other_parameters(), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"'a', steps: expected an integer of at least 1; got 0"),
        ({"steps": -2}, r"steps: expected an integer of at least 1; got -2"),
        ({"steps": 1.5}, r"steps: expected an integer"),
        ({"steps": True}, r"steps: expected an integer"),
        ({"accumulate": 0}, r"accumulate: expected an integer of at least 1"),
        ({"warmup": -1}, r"warmup: expected an integer of at least 0"),
        ({"grad_clip": 0.0}, r"grad_clip: expected a positive number"),
        ({"grad_clip": math.inf}, r"grad_clip: expected a positive number"),
        ({"depends_on": "arch"}, r"depends_on: expected a sequence of problem names.*\('arch',\); got the string"),
        ({"depends_on": 3}, r"depends_on: expected a sequence"),
        ({"depends_on": ["b", "b"]}, r"depends_on: expected each name once; got b more than once"),
        ({"depends_on": {"not legal": "b"}}, r"role: expected a Python identifier"),
        ({"depends_on": {"role": "not legal"}}, r"name: expected a Python identifier"),
        ({"constants": "b"}, r"constants: expected a sequence of problem names"),
        ({"hypergradient": "cg"}, r"hypergradient: expected a method such as mlo.FiniteDifference\(\); got 'cg'"),
        ({"hypergradient": mlo.Neumann}, r"hypergradient: .*write Neumann\(\)"),
        ({"data": []}, r"data: expected at least one batch; got empty data"),
        ({"data": iter([1])}, r"data: expected a re-iterable.*run through again; got list_iterator"),
        ({"data": torch.ones(3, 2)}, r"data: expected .*pass \[batch\]; got Tensor"),
        ({"data": {"x": 1}}, r"data: expected .*got dict"),
        ({"data": 5}, r"data: expected a re-iterable of batches.*got int"),
        (
            {"data": DataLoader(TensorDataset(torch.ones(3, 2)), 8, drop_last=True)},
            r"data: expected at least one batch",
        ),
        ({"optimizer": optim.SGD}, r"optimizer: expected a torch.optim.Optimizer"),
        ({"optimizer": "sgd"}, r"optimizer: expected a torch.optim.Optimizer"),
        ({"scheduler": "cosine"}, r"scheduler: expected a scheduler of torch.optim.lr_scheduler"),
    ],
)
def test_options_of_a_problem(options, message):
    with pytest.raises(mlo.ConfigurationError, match=message):
        Stage(**options)


def test_optimizers_of_other_parameters():
    with pytest.raises(
        mlo.ConfigurationError, match=r"'a', optimizer: expected parameters of the problem's module only"
    ):
        Stage(optimizer=adam_of_other_parameters())
    m, other = module(), module()
    with pytest.raises(mlo.ConfigurationError, match=r"got 1 of 2 that are not in the module"):
        Stage(m=m, optimizer=optim.SGD([*m.parameters(), *other.parameters()], lr=0.1))


def test_schedulers_of_other_optimizers():
    with pytest.raises(mlo.ConfigurationError, match=r"'a', scheduler: .*got one of another optimizer"):
        Stage(scheduler=scheduler_of_another_optimizer())
    with pytest.raises(mlo.ConfigurationError, match=r"'a', scheduler: expected none without an optimizer"):
        Stage(optimizer=None, scheduler=scheduler_of_another_optimizer())
    m = module()
    o = optim.SGD(m.parameters(), lr=0.1)
    with pytest.raises(mlo.ConfigurationError, match=r"'a', scheduler: .*validation_step"):
        Stage(m=m, optimizer=o, scheduler=optim.lr_scheduler.ReduceLROnPlateau(o))


def frozen():
    m = module()
    m.requires_grad_(False)
    return m


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, requires_grad=True), r"module: expected a torch.nn.Module; wrap a bare tensor"),
        (lambda: nn.Identity(), r"module: expected at least one parameter with requires_grad; got none"),
        (frozen, r"module: expected at least one parameter with requires_grad; got only frozen ones"),
        (lambda: nn.LazyLinear(3), r"module: expected initialised parameters"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), r"module: expected real parameters; got complex 'weight'"),
        (
            lambda: nn.DataParallel(nn.Linear(2, 2)),
            r"module: expected the bare module.*wrapper.module.*got DataParallel",
        ),
    ],
)
def test_modules(make, message):
    with pytest.raises(mlo.ConfigurationError, match=r"problem 'a', " + message):
        Stage(m=make(), optimizer=None)


def test_a_module_under_distributed_data_parallel_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(mlo.ConfigurationError, match=r"expected the bare module.*got DistributedDataParallel"):
            Stage(m=nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), optimizer=None)
    finally:
        torch.distributed.destroy_process_group()


def test_problem_is_abstract():
    with pytest.raises(TypeError, match="training_step"):
        mlo.Problem("a", module())


@pytest.mark.parametrize("reserved", ["params", "deps", "__call__"])
def test_reserved_names(reserved):
    with pytest.raises(mlo.ConfigurationError, match=f"Bad.{reserved}: this name is reserved"):
        type("Bad", (Stage,), {reserved: None})


def test_a_constructor_that_does_not_call_super():
    class Forgetful(mlo.Problem):
        def __init__(self):
            self.mine = 1

        def training_step(self, batch):
            return None

    with pytest.raises(mlo.ConfigurationError, match=r"Forgetful does not call super"):
        mlo.Engine([Forgetful()])


def test_users_may_set_attributes_of_their_own_and_override_the_constructor():
    class Mine(Stage):
        def __init__(self, penalty):
            self.penalty = penalty
            super().__init__("mine")

        def training_step(self, batch):
            return self.penalty * super().training_step(batch)

    problem = Mine(3.0)
    problem.history = []
    assert mlo.Engine([problem]).step()["mine"].loss == 6.0


# --- the graph -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("definitions", "message"),
    [
        ([("a", ["b"]), ("a", ["b"])], r"problem names must be unique; 'a' given more than once"),
        ([("a", ["a"])], r"problem 'a', depends_on: names itself"),
        ([("a", ["x"]), ("b", ["a"])], r"problem 'a', depends_on: unknown problem 'x'; the engine holds 'a', 'b'"),
        ([("a", ["b"]), ("b", ["a"]), ("c", [])], r"problem 'c' has no edge to any other of the 3 problems"),
        ([("a", []), ("b", [])], r"problem 'a' has no edge"),
        (
            [("w", ["a", "b"]), ("a", ["w"]), ("b", ["w"])],
            r"'b' reads the response of 'w', which depends on 'a'.*constants=\('a',\)",
        ),
        ([("w", ["a", "b"]), ("a", ["w"]), ("b", ["w"], ["x"])], r"'b', constants: unknown problem 'x'"),
        ([("w", ["b"]), ("b", ["w"], ["b"])], r"'b', constants: names itself"),
        ([("w", ["b"], ["b"]), ("b", ["w"])], r"'w', constants: 'b' comes later"),
        (
            [("v", ["w"]), ("w", ["b", "v"]), ("u", ["b"]), ("b", ["w"], ["u"])],
            r"'b', constants: 'u' is neither a dependency",
        ),
        (
            [("w", ["a", "b"]), ("a", ["w"]), ("b", ["w"], ["a"]), ("p", ["a", "b", "w"])],
            r"'p' reads the responses of .*'a'.*game between them.*Let one of them lead",
        ),
        (
            [("w", ["a", "b"]), ("a", ["w"]), ("b", ["w"], ["a"]), ("p", ["b"])],
            r"'p' reads the response of '[bw]', which depends on 'a'",
        ),
    ],
)
def test_graphs(definitions, message):
    problems = [
        Stage(name, depends_on=reads, constants=constants[0] if constants else ())
        for name, reads, *constants in definitions
    ]
    with pytest.raises(mlo.GraphError, match=message):
        mlo.Engine(problems)


def test_a_parameter_in_two_problems():
    m = module()
    with pytest.raises(mlo.GraphError, match=r"'a' and 'b' both hold the parameter 'w'"):
        mlo.Engine([Stage("a", m, depends_on=["b"]), Stage("b", m, depends_on=["a"])])
    m.requires_grad_(False)
    both = [nn.ModuleList([m, module()]) for _ in range(2)]  # a frozen one may be shared
    mlo.Engine([Stage("a", both[0], depends_on=["b"]), Stage("b", both[1], depends_on=["a"])])


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ([], "at least one problem"),
        (3, "a sequence of problems"),
        ([3], "instances of mlo.Problem"),
        (None, "a sequence"),
    ],
)
def test_what_an_engine_is_given(problems, message):
    with pytest.raises(mlo.ConfigurationError, match=message):
        mlo.Engine(problems)
    with pytest.raises(mlo.ConfigurationError, match="a sequence of problems"):
        mlo.Engine(Stage())


@pytest.mark.parametrize("method", [mlo.FiniteDifference(), mlo.Neumann(3), mlo.Identity(scale=None)])
def test_a_method_that_needs_a_learning_rate_at_a_stage_without_optimizer(method):
    with pytest.raises(
        mlo.ConfigurationError, match=r"at stage 'a' takes the stage's learning rate.*no optimizer.*scale="
    ):
        mlo.Engine([Stage("a", optimizer=None, depends_on=["b"], hypergradient=method), Stage("b", depends_on=["a"])])


def test_a_method_at_the_problem_above_is_warned_of():
    with pytest.warns(
        mlo.MloWarning, match=r"'b', hypergradient=Neumann: not used.*here to 'a', for want of one by ConjugateGradient"
    ):
        mlo.Engine([Stage("a", depends_on=["b"]), Stage("b", depends_on=["a"], hypergradient=mlo.Neumann(3))])


# --- running ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda p, b: p.params["w"] * 2,
            r"'a': training_step returned a tensor of shape \(2,\); expected a scalar.*mean",
        ),
        (lambda p, b: p.params["w"].sum().detach(), r"'a': training_step returned a tensor without a graph"),
        (lambda p, b: torch.no_grad()(lambda: p.params["w"].sum())(), r"without a graph.*no_grad"),
        (lambda p, b: p.params["w"].sum() * math.nan, r"'a': training_step returned nan; expected a finite number"),
        (lambda p, b: p.params["w"].sum() * math.inf, r"returned inf"),
        (lambda p, b: None, r"returned NoneType; expected a scalar tensor"),
        (lambda p, b: 3.0, r"returned float; expected a scalar tensor"),
        (lambda p, b: {"cost": p.params["w"].sum()}, r"returned a dict with 'cost'; expected the key 'loss'"),
        (lambda p, b: {"loss": p.params["w"].sum(), "log": "text"}, r"'log' returned str; expected a number"),
        (lambda p, b: torch.tensor(3), r"torch.int64; expected a real floating-point scalar"),
        (lambda p, b: (p.params["w"] * 0).sum().sqrt(), r"gradient of its loss is not finite in the parameters w"),
        (lambda p, b: torch.ones((), requires_grad=True) * 2, r"does not depend on any of the parameters"),
    ],
)
def test_losses(loss, message):
    problem = Stage()
    problem.training_step = lambda batch: loss(problem, batch)
    before = problem.module["w"].detach().clone()
    engine = mlo.Engine([problem])
    with pytest.raises(mlo.LossError, match=message):
        engine.step()
    assert torch.equal(problem.module["w"], before)
    assert problem.module["w"].grad is None


def test_losses_of_one_element_count_as_scalars():
    assert step_with(lambda p, b: p.params["w"].sum().reshape(1, 1))["a"].loss == 2.0


def test_undeclared_and_unknown_names_inside_a_loss():
    with pytest.raises(
        mlo.DependencyError, match=r"'a' reaches for the dependency 'arch', which it does not declare.*depends_on"
    ):
        step_with(lambda p, b: p.deps.arch.params["w"].sum())
    with pytest.raises(mlo.DependencyError, match=r"'a' has no parameter 'bias'; it has w"):
        step_with(lambda p, b: p.params["bias"].sum())
    problem = Stage(depends_on=["b"])
    assert not hasattr(problem.deps, "arch")
    assert "b" in problem.deps
    assert "arch" not in problem.deps
    with pytest.raises(mlo.DependencyError, match="before it is part of an engine"):
        problem.deps.b  # noqa: B018


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="before Python 3.11 errors have no notes")
def test_a_dependency_that_is_looked_for_among_the_attributes():
    a, b = Stage("a", depends_on={"role": "b"}), Stage("b", depends_on=["a"])
    engine = mlo.Engine([a, b])
    for name, notes in (
        ("role", ["'role' is a dependency of problem 'a': it is read by self.deps.role."]),
        ("b", []),
    ):
        a.training_step = lambda batch, name=name: getattr(a, name).params["w"].sum()
        with pytest.raises(AttributeError) as caught:
            engine.step()
        assert getattr(caught.value, "__notes__", []) == notes


def test_an_attribute_of_another_object_by_the_name_of_a_dependency():
    a, b = Stage("a", depends_on={"role": "b"}), Stage("b", depends_on=["a"])
    a.training_step = lambda batch: a.module.role.sum()
    with pytest.raises(AttributeError, match="role") as caught:
        mlo.Engine([a, b]).step()
    assert getattr(caught.value, "__notes__", []) == []


def test_views_are_read_only():
    problem, upper = Stage("a", depends_on=["b"]), Stage("b", depends_on=["a"])
    mlo.Engine([problem, upper])
    with pytest.raises(mlo.DependencyError, match="read-only"):
        problem.deps.b.params = {}
    with pytest.raises(mlo.DependencyError, match="read-only"):
        problem.deps.b.params["w"] = torch.ones(2)
    with pytest.raises(mlo.DependencyError, match="read-only"):
        problem.params.update(w=1)
    with pytest.raises(AttributeError):
        problem.params = {}


def test_a_dependency_that_is_never_used_is_warned_of_once():
    a, b = Stage("a", depends_on=["b"]), Stage("b", depends_on=["a"])
    a.training_step = lambda batch: a.params["w"].square().sum()
    engine = mlo.Engine([a, b])
    with pytest.warns(
        mlo.UnusedDependencyWarning, match=r"'a' declares that it depends on 'b', but its loss did not read it"
    ):
        engine.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.step()


def test_a_dependency_that_only_says_who_leads_is_not_warned_of():
    w, a, b = Stage("w", depends_on=["a", "b"]), Stage("a", depends_on=["w"]), Stage("b", depends_on=["w", "a"])
    b.training_step = lambda batch: (b.params["w"] - b.deps.w.params["w"]).square().sum()
    mlo.Engine([w, a, b]).step()


def test_data_that_gives_nothing():
    class Hollow:
        def __iter__(self):
            return iter(())

    with pytest.raises(mlo.ConfigurationError, match=r"'a', data: expected at least one batch each time"):
        mlo.Engine([Stage(data=Hollow())]).step()

    class Once:
        def __init__(self):
            self.left = iter([1])

        def __iter__(self):
            return (x for x in self.left)

    engine = mlo.Engine([Stage(data=Once())])
    engine.step()
    with pytest.raises(mlo.ConfigurationError, match="only once"):
        engine.step()


@pytest.mark.parametrize("batch", [torch.ones(4, 2), (1, 2), {"x": 3}, "text", None, [torch.ones(1)]])
def test_a_batch_reaches_the_loss_as_the_data_gave_it(batch):
    seen = []
    step_with(lambda p, b: seen.append(b) or p.params["w"].sum(), data=[batch])
    assert seen[0] is batch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"steps": 0}, "steps=0"), ({"steps": 2.5}, "steps=2.5"), ({"steps": 1, "validate_every": 0}, "validate_every=0")],
)
def test_arguments_of_run(arguments, message):
    with pytest.raises(mlo.ConfigurationError, match=message):
        mlo.Engine([Stage()]).run(**arguments)


def test_hypergradient_of_an_unknown_problem():
    with pytest.raises(mlo.ConfigurationError, match=r"hypergradient\('x'\): expected the name of a problem, one of a"):
        mlo.Engine([Stage()]).hypergradient("x")


# --- methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlo.Neumann(terms=0), r"Neumann\(terms=0\): expected an integer of at least 1"),
        (lambda: mlo.Neumann(terms=2.0), r"Neumann\(terms=2.0\)"),
        (lambda: mlo.Neumann(scale=-1), r"Neumann\(scale=-1\): expected a positive number, or None"),
        (lambda: mlo.Neumann(rtol=1), r"Neumann\(rtol=1\): expected a number in \[0, 1\)"),
        (lambda: mlo.Identity(scale=0), r"Identity\(scale=0\)"),
        (lambda: mlo.Identity(scale="lr"), r"Identity\(scale='lr'\)"),
        (lambda: mlo.FiniteDifference(scale=math.nan), r"FiniteDifference\(scale=nan\)"),
        (lambda: mlo.FiniteDifference(epsilon=0), r"FiniteDifference\(epsilon=0\): expected a positive number"),
        (lambda: mlo.ConjugateGradient(max_steps=0), r"ConjugateGradient\(max_steps=0\)"),
        (lambda: mlo.ConjugateGradient(rtol=-1e-3), r"ConjugateGradient\(rtol=-0.001\)"),
        (
            lambda: mlo.ConjugateGradient(damping=-1),
            r"ConjugateGradient\(damping=-1\): expected a number of at least 0",
        ),
        (lambda: mlo.ConjugateGradient(warm_start=1), r"ConjugateGradient\(warm_start=1\): expected True or False"),
        (lambda: mlo.Dense(max_size=0), r"Dense\(max_size=0\)"),
        (
            lambda: mlo.Dense(on_breakdown="ignore"),
            r"Dense\(on_breakdown='ignore'\): expected one of 'warn', 'raise', 'skip'",
        ),
    ],
)
def test_options_of_methods(make, message):
    with pytest.raises(mlo.ConfigurationError, match=message):
        make()


def test_dense_refuses_large_stages():
    stages, top = zoo.two_levels(mlo.Dense(max_size=5))
    with pytest.raises(
        mlo.ConfigurationError, match=r"Dense at stage 'top/w': 6 parameters.*max_size=5.*ConjugateGradient"
    ):
        mlo.Engine([*stages, top]).hypergradient("top")


INDEFINITE = torch.diag(torch.tensor([1.0, 2, 3, -1, 1, 2], dtype=torch.float64))
BREAKDOWNS = [
    (mlo.ConjugateGradient, {}, INDEFINITE, mlo.Status.NEGATIVE_CURVATURE),
    (mlo.ConjugateGradient, {}, torch.zeros(6, 6, dtype=torch.float64), mlo.Status.SINGULAR),
    (mlo.Neumann, {"terms": 50, "scale": 0.5}, 10 * torch.eye(6, dtype=torch.float64), mlo.Status.DIVERGED),
    (mlo.Neumann, {"terms": 500, "scale": 0.5}, 10 * torch.eye(6, dtype=torch.float64), mlo.Status.DIVERGED),
    (mlo.Neumann, {"terms": 50, "scale": 0.5}, INDEFINITE, mlo.Status.DIVERGED),
    (mlo.Dense, {}, torch.diag(torch.tensor([1.0, 2, 3, 0, 1, 2], dtype=torch.float64)), mlo.Status.SINGULAR),
]


@pytest.mark.parametrize(("kind", "options", "hessian", "status"), BREAKDOWNS)
def test_breakdowns_are_reported_and_handled_by_the_policy(kind, options, hessian, status):
    def engine(policy):
        torch.manual_seed(0)
        stages, top = zoo.two_levels(kind(**options, on_breakdown=policy), hessian=hessian)
        return mlo.Engine([*stages, top])

    with pytest.warns(
        mlo.BreakdownWarning, match=f"top/w: {kind.__name__} ended with {status.name}. {status.remedy[:20]}"
    ):
        report = engine("warn").step()["top"]
    assert report.outcome == "stepped"
    assert report.solves["top/w"].statuses == {status: 1}
    assert not report.solves["top/w"].ok

    raising = engine("raise")
    before = zoo.flat(raising.problems["top"].params).detach().clone()
    with pytest.raises(mlo.BreakdownError, match=f"{status.name}.*iterations") as caught:
        raising.step()
    assert caught.value.report.status is status
    assert torch.equal(zoo.flat(raising.problems["top"].params), before)

    skipping = engine("skip")
    report = skipping.step()["top"]
    assert (report.outcome, report.steps) == ("skipped", 0)
    assert report.solves["top/w"].statuses == {status: 1}
    assert torch.equal(zoo.flat(skipping.problems["top"].params), before)
    with pytest.raises(mlo.BreakdownError):
        skipping.hypergradient("top")
    assert skipping.step()["w"].outcome == "stepped"


def test_conjugate_gradients_that_stop_early_are_usable_and_say_so():
    stages, top = zoo.two_levels(mlo.ConjugateGradient(max_steps=2))
    summary = mlo.Engine([*stages, top]).step()["top"].solves["top/w"]
    assert summary.statuses == {mlo.Status.TRUNCATED: 1}
    assert summary.ok
    assert 0 < summary.worst_residual < 1


@pytest.mark.parametrize("method", [mlo.FiniteDifference(), mlo.Identity(), mlo.ConjugateGradient(), mlo.Dense()])
def test_a_cotangent_that_is_not_finite_is_reported(method):
    class Steep(zoo.Target):
        def training_step(self, batch):
            loss = super().training_step(batch)
            return loss + (self.deps["w"].params["rest"] * 0).square().sum().sqrt()  # its derivative is NaN

    top = Steep(reads=["w"])
    engine = mlo.Engine([zoo.Quadratic("w", reads=["top"], hypergradient=method), top])
    with pytest.warns(mlo.BreakdownWarning, match="NON_FINITE"), pytest.raises(mlo.LossError, match="not finite"):
        engine.step()


def test_no_remedy_is_shared_and_none_is_empty():
    assert len({s.remedy for s in mlo.Status}) == len(mlo.Status)
    assert all(len(s.remedy) > 40 for s in mlo.Status)


# --- the functional form ---------------------------------------------------------------------------------------


def quadratic(w, x):
    return ((w - x) ** 2).sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, torch.ones(2), torch.ones(2), mlo.Dense()), r"loss=None\): expected a function"),
        ((quadratic, torch.ones(2), torch.ones(2), "cg"), r"method='cg'\): expected a hypergradient method"),
        ((quadratic, 3.0, torch.ones(2), mlo.Dense()), r"solution=…\): expected a tensor or a nested.*got 3.0"),
        ((quadratic, torch.ones(2), [torch.ones(2), "x"], mlo.Dense()), r"dependencies=…\).*got 'x'"),
        ((quadratic, [], torch.ones(2), mlo.Dense()), r"solution=…\).*got nothing"),
        ((quadratic, torch.ones(2, dtype=torch.long), torch.ones(2), mlo.Dense()), r"real floating-point tensors"),
        ((quadratic, torch.ones(2), torch.ones(2), mlo.FiniteDifference()), r"FiniteDifference\(scale=0.1\)"),
        ((quadratic, torch.ones(2), torch.ones(2), mlo.Neumann(3)), r"Neumann\(scale=0.1\)"),
        ((quadratic, torch.ones(2), torch.ones(2), mlo.ConjugateGradient(warm_start=True)), r"warm_starts="),
    ],
)
def test_arguments_of_best_response(arguments, message):
    with pytest.raises(mlo.ConfigurationError, match=message):
        mlo.best_response(*arguments)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda w, x: (w - x) ** 2, r"returned a tensor of shape \(2,\)"),
        (lambda w, x: (x**2).sum(), r"does not depend on any of the parameters"),
        (lambda w, x: torch.tensor(1.0), r"does not depend"),
        (lambda w, x: quadratic(w, x) * math.nan, r"returned nan"),
    ],
)
def test_losses_of_best_response(loss, message):
    x = torch.ones(2, requires_grad=True)
    w = mlo.best_response(loss, torch.ones(2), x, mlo.ConjugateGradient())
    with pytest.raises(mlo.LossError, match=message):
        w.sum().backward()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"w": torch.ones(2)}, {"v": torch.ones(2)}, r"only on the left: 'w'; only on the right: 'v'"),
        ([torch.ones(2)], [], r"as many tensors on both sides; got 1 and 0"),
        ([], [], r"at least one tensor"),
        (torch.ones(2), torch.ones(1), r"shape \(2,\) on the left and \(1,\) on the right"),
        (torch.ones(2), [torch.ones(2)], r"got Tensor and list"),
    ],
)
def test_arguments_of_squared_distance(a, b, message):
    with pytest.raises(mlo.ConfigurationError, match=message):
        mlo.squared_distance(a, b)
