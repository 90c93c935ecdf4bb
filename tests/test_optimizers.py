"""The optimizer and scheduler objects are the user's own, and say what the stage's stationary point is."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import mlo
from tests import zoo

LR = 0.05


def engine_and_twin(make_optimizer, make_scheduler=None, steps=3, **options):
    """An engine over two levels, and a hand-written loop of the lower stage with the same objects."""
    torch.manual_seed(4)
    stages, top = zoo.two_levels(mlo.StopGradient())
    stage = stages[0]
    top.optimizer = None
    torch.manual_seed(4)
    twin = zoo.two_levels(mlo.StopGradient())[0][0].module
    stage.optimizer, own = make_optimizer(stage.module), make_optimizer(twin)
    if make_scheduler:
        stage.scheduler, scheduler = make_scheduler(stage.optimizer), make_scheduler(own)
    engine = mlo.Engine([stage, top])
    values = {"top": zoo.flat(dict(top.module.named_parameters())).detach()}
    for _ in range(steps):
        engine.step()
        theta = zoo.flat(dict(twin.named_parameters()))
        loss = 0.5 * theta @ stage.hessian @ theta - theta @ stage.right_side(values)
        own.zero_grad()
        loss.backward()
        own.step()
        if make_scheduler:
            scheduler.step()
    return stage, twin, own


def assert_equal_modules(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: optim.SGD(m.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda m: optim.SGD([{"params": [m.scalar], "lr": 0.5}, {"params": [m.rest, m.unused]}], lr=LR),
        lambda m: optim.Adam(m.parameters(), lr=LR, amsgrad=True, weight_decay=0.1),
        lambda m: optim.AdamW(m.parameters(), lr=LR, weight_decay=0.3),
        lambda m: optim.RMSprop(m.parameters(), lr=LR, momentum=0.5, centered=True),
        lambda m: optim.Adagrad(m.parameters(), lr=LR),
        lambda m: optim.Adadelta(m.parameters()),
        lambda m: optim.Adamax(m.parameters(), lr=LR),
        lambda m: optim.NAdam(m.parameters(), lr=LR),
        lambda m: optim.RAdam(m.parameters(), lr=LR),
        lambda m: optim.ASGD(m.parameters(), lr=LR),
        lambda m: optim.Rprop(m.parameters(), lr=LR),
    ],
)
def test_every_optimizer_steps_as_in_a_hand_written_loop(make):
    stage, twin, _ = engine_and_twin(make)
    assert_equal_modules(stage.module, twin)


def test_lbfgs_steps_as_in_a_hand_written_loop_and_solves_a_quadratic():
    torch.manual_seed(4)
    stages, top = zoo.two_levels(mlo.ConjugateGradient())
    stage, top.optimizer = stages[0], None
    torch.manual_seed(4)
    twin = zoo.two_levels(mlo.ConjugateGradient())[0][0].module
    stage.optimizer, own = (
        optim.LBFGS([p for p in m.parameters() if p.requires_grad], max_iter=8, line_search_fn="strong_wolfe")
        for m in (stage.module, twin)
    )
    engine = mlo.Engine([stage, top])
    values = {"top": zoo.flat(top.params).detach()}

    def closure():
        own.zero_grad()
        theta = zoo.flat(dict(twin.named_parameters()))
        loss = 0.5 * theta @ stage.hessian @ theta - theta @ stage.right_side(values)
        loss.backward()
        return loss

    for _ in range(4):
        engine.step()
        own.step(closure)
    assert_equal_modules(stage.module, twin)
    found = zoo.flat(stage.params).detach()
    assert zoo.relative_error(found, zoo.solve_in_order(stages, top)["w"]) < 1e-4


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, 0.01),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR uses it itself in old torch
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_steps_after_each_optimizer_step(name):
    stage, twin, own = engine_and_twin(
        lambda m: optim.SGD(m.parameters(), lr=LR, momentum=0.9), SCHEDULERS[name], steps=6
    )
    assert_equal_modules(stage.module, twin)
    assert stage.optimizer.param_groups[0]["lr"] == own.param_groups[0]["lr"]


def test_all_schedulers_of_torch_are_covered():
    kinds = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert kinds - {"LRScheduler", "ReduceLROnPlateau"} <= set(SCHEDULERS)


class Validated(zoo.Quadratic):
    metrics = iter(())

    def validation_step(self):
        assert not self.module.training
        assert not torch.is_grad_enabled()
        return next(self.metrics)


def test_reduce_on_plateau_steps_at_validation_with_its_metric():
    top = zoo.Target(reads=["w"])
    stage = Validated("w", reads=["top"])
    stage.scheduler = lr_scheduler.ReduceLROnPlateau(stage.optimizer, factor=0.5, patience=0)
    stage.metrics = iter([1.0, 2.0, torch.tensor(3.0)])
    seen = []
    engine = mlo.Engine([stage, top])
    engine.run(
        6,
        validate_every=2,
        callbacks=[lambda e, r: seen.append((r["w"].validation, stage.optimizer.param_groups[0]["lr"]))],
    )
    assert [lr for _, lr in seen] == [0.1, 0.1, 0.1, 0.05, 0.05, 0.025]
    assert [v for v, _ in seen] == [None, {"loss": 1.0}, None, {"loss": 2.0}, None, {"loss": 3.0}]
    assert stage.module.training
    stage.metrics = iter([{"accuracy": 0.5}])
    with pytest.raises(
        mlo.ConfigurationError, match=r"'w': validation_step returned 'accuracy'; expected the key 'loss'"
    ):
        engine.validate()


# --- the stationary point --------------------------------------------------------------------------------------


def with_decay(make, decays, sign=1.0):
    """The hypergradient at the optimizer's own fixed point, and the closed form with the decay in the Hessian."""
    torch.manual_seed(2)
    stages, top = zoo.chain(mlo.ConjugateGradient(rtol=1e-13), length=2)
    diagonal = torch.cat([torch.full((1,), decays[0]), torch.full((3,), decays[1]), torch.full((2,), decays[1])])
    for stage in stages:
        stage.optimizer = make(stage.module)
    engine = mlo.Engine([*stages, top])
    plain = [s.hessian for s in stages]
    for s in stages:
        s.hessian = s.hessian + torch.diag(diagonal)
    expected = zoo.exact_hypergradient(stages, top)
    for s, h in zip(stages, plain, strict=True):
        s.hessian = h
    return zoo.by_engine(engine, top), expected


def groups(m, decays):
    rest = [m.rest, m.inner["deep"][0], m.unused]
    return [{"params": [m.scalar], "weight_decay": decays[0]}, {"params": rest, "weight_decay": decays[1]}]


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.RMSprop, optim.Adagrad, optim.Adamax, optim.NAdam])
def test_l2_decay_of_the_optimizer_belongs_to_the_stage_by_parameter_group(kind):
    decays = (0.3, 1.2)
    found, expected = with_decay(lambda m: kind(groups(m, decays), lr=LR), decays)
    assert zoo.relative_error(found, expected) < 1e-10
    # And it is where the optimizer really goes.
    torch.manual_seed(2)
    stages, top = zoo.two_levels(mlo.ConjugateGradient())
    stage = stages[0]
    top.optimizer = None
    stage.optimizer = optim.SGD(groups(stage.module, decays), lr=0.1)
    mlo.Engine([stage, top]).run(800)
    x = zoo.flat(dict(top.module.named_parameters()))
    decay = torch.diag(torch.tensor([0.3, 1.2, 1.2, 1.2, 1.2, 1.2]))
    fixed = torch.linalg.solve(stage.hessian + decay, stage.right_side({"top": x}))
    assert zoo.relative_error(zoo.flat(dict(stage.module.named_parameters())), fixed) < 1e-9


@pytest.mark.parametrize(
    "make",
    [
        lambda m: optim.AdamW(groups(m, (0.3, 1.2)), lr=LR),
        lambda m: optim.NAdam(groups(m, (0.3, 1.2)), lr=LR, decoupled_weight_decay=True),
        lambda m: optim.Adafactor(groups(m, (0.3, 1.2)), lr=LR),
    ],
)
def test_decoupled_decay_is_left_out(make):
    found, expected = with_decay(make, (0.0, 0.0))
    assert zoo.relative_error(found, expected) < 1e-10


class Negated(zoo.Quadratic):
    def training_step(self, batch):
        return -super().training_step(batch)


@pytest.mark.parametrize("decay", [0.2, 0.0])
@pytest.mark.parametrize(
    ("method", "inverse"),
    [
        (
            mlo.ConjugateGradient(on_breakdown="raise"),
            lambda s, decay: torch.linalg.inv(s.hessian + decay * torch.eye(s.n)),
        ),
        (mlo.FiniteDifference(), lambda s, _: 0.1 * torch.eye(s.n)),
        (mlo.Identity(scale=0.3), lambda s, _: 0.3 * torch.eye(s.n)),
        (mlo.Neumann(1, 0.3), lambda s, _: 0.3 * torch.eye(s.n)),
    ],
)
def test_a_stage_that_maximises(method, inverse, decay):
    """SGD(maximize=True) on −L, with L2 decay or without: the same solution as minimising L with it."""
    top = zoo.Target(reads=["w"])
    stage = Negated("w", reads=["top"], hypergradient=method)
    stage.optimizer = optim.SGD(stage.module.parameters(), lr=0.1, maximize=True, weight_decay=decay)
    engine = mlo.Engine([stage, top])
    plain = stage.hessian
    stage.hessian = plain + decay * torch.eye(6)
    zoo.solve_in_order([stage], top)
    stage.hessian = plain
    # The closed form with the decay in its inverse, at the solution with the decay.
    values = {
        "top": zoo.flat(dict(top.module.named_parameters())),
        "w": zoo.flat(dict(stage.module.named_parameters())),
    }
    total, cotangents = top.direct(values["top"], values)
    expected = total + stage.couplings["top"].T @ inverse(stage, decay) @ cotangents["w"]
    assert zoo.relative_error(zoo.by_engine(engine, top), expected.detach()) < 1e-8


class Foreign(optim.SGD):
    """A third party's optimizer: derived from torch's own, it is known to decay like it."""


class Unknown(optim.Optimizer):
    def __init__(self, params, weight_decay):
        super().__init__(params, {"lr": 0.1, "weight_decay": weight_decay})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


def test_an_unknown_optimizer_with_decay_is_warned_of():
    stages, top = zoo.two_levels(mlo.ConjugateGradient())
    stages[0].optimizer = Unknown(stages[0].module.parameters(), 0.1)
    with pytest.warns(mlo.MloWarning, match=r"'w': Unknown is no optimizer of torch.*weight_decay"):
        mlo.Engine([*stages, top])
    for known in (
        Unknown(stages[0].module.parameters(), 0.0),
        Foreign(stages[0].module.parameters(), weight_decay=0.1),
    ):
        stages[0].optimizer = known
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mlo.Engine([*stages, top])


# --- which parameters are optimized ----------------------------------------------------------------------------


def test_an_optimizer_of_some_of_the_parameters_leaves_the_others_constant():
    torch.manual_seed(3)
    stages, top = zoo.two_levels(mlo.ConjugateGradient(rtol=1e-13))
    stage = stages[0]
    m = stage.module
    stage.optimizer = optim.SGD([m.scalar, m.rest], lr=0.1)
    kept = m.inner["deep"][0].detach().clone()
    engine = mlo.Engine([stage, top])
    found = engine.hypergradient("top")
    assert set(engine.hypergradient("w")) == {"scalar", "rest"}
    # By elimination: the last two coordinates are fixed.
    values = {n: zoo.flat(dict(p.module.named_parameters())).detach() for n, p in engine.problems.items()}
    free = stage.hessian[:4, :4]
    total, cotangents = top.direct(values["top"], values)
    expected = total + stage.couplings["top"][:4].T @ torch.linalg.solve(free, cotangents["w"][:4])
    assert zoo.relative_error(zoo.flat(found), expected) < 1e-10
    engine.step()
    assert torch.equal(m.inner["deep"][0], kept)


def test_unfreezing_between_steps_is_followed():
    torch.manual_seed(3)
    stages, top = zoo.two_levels(mlo.ConjugateGradient())
    m = stages[0].module
    m.rest.requires_grad_(False)
    engine = mlo.Engine([*stages, top])
    before = m.rest.detach().clone()
    engine.step()
    assert torch.equal(m.rest, before)
    m.rest.requires_grad_(True)
    engine.step()
    assert not torch.equal(m.rest, before)
    assert "rest" in engine.hypergradient("w")


def test_gradient_clipping_and_accumulation_equal_a_hand_written_loop():
    torch.manual_seed(0)
    data = [torch.randn(4) for _ in range(5)]

    class Mean(mlo.Problem):
        def training_step(self, batch):
            loss = (self(batch) - 1).square().sum() + self.module.weight.square().sum()
            return {"loss": loss, "size": batch.norm(), "count": 1}

    net, twin = nn.Linear(4, 2), nn.Linear(4, 2)
    twin.load_state_dict(net.state_dict())
    optimizer, own = (optim.SGD(m.parameters(), lr=0.1) for m in (net, twin))
    problem = Mean("mean", net, optimizer=optimizer, data=data, accumulate=3, grad_clip=0.7)
    engine = mlo.Engine([problem])
    used = 0
    for _ in range(4):
        report = engine.step()["mean"]
        own.zero_grad()
        micro = [data[(used + i) % 5] for i in range(3)]
        used += 3
        losses = [(twin(b) - 1).square().sum() + twin.weight.square().sum() for b in micro]
        for loss in losses:
            (loss / 3).backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.7)
        own.step()
        assert report.loss == pytest.approx(sum(x.item() for x in losses) / 3)
        assert report.gradient_norm == pytest.approx(norm.item())
        assert report.metrics == {"size": pytest.approx(sum(b.norm().item() for b in micro) / 3), "count": 1.0}
    assert_equal_modules(net, twin)


def test_the_hessian_of_a_step_covers_all_its_micro_batches():
    torch.manual_seed(0)
    a = [zoo.spd(3) for _ in range(4)]
    t = torch.randn(3)

    class Lower(mlo.Problem):
        def training_step(self, batch):
            w = self.params["w"]
            return 0.5 * w @ batch @ w - w @ self.deps.x.params["w"]

    class Upper(mlo.Problem):
        def training_step(self, batch):
            return 0.5 * (self.deps.w.params["w"] - t).square().sum()

    made = []
    for kind, name, reads, options in (
        (Lower, "w", ["x"], {"data": a, "accumulate": 3, "hypergradient": mlo.ConjugateGradient()}),
        (Upper, "x", ["w"], {}),
    ):
        module = nn.ParameterDict({"w": torch.randn(3)})
        made.append(kind(name, module, optimizer=optim.SGD(module.parameters(), lr=0.1), depends_on=reads, **options))
    engine = mlo.Engine(made)
    engine.step()
    w = made[0].module["w"].detach()
    expected = torch.linalg.solve(sum(a[:3]) / 3, w - t)
    assert zoo.relative_error(engine.hypergradient("x")["w"], expected) < 1e-10
