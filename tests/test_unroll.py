"""Differentiating through recorded optimizer steps, against autograd through a hand-written unrolled loop."""

import copy

import pytest
import torch
from torch import nn

import mlo
from mlo.hypergradient.unroll import _Sweep
from mlo.optimizer_steps import differentiable_step, optimizer_state


def data():
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 3, generator=draw, dtype=torch.float64), torch.randn(12, generator=draw, dtype=torch.float64))
        for _ in range(3)
    ]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
        self.drop = nn.Dropout(0.2)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.first(x)))).squeeze(1)


def fit(network, batch, weights):
    """The loss of the lower problem; `weights` is what the upper one chooses."""
    x, y = batch
    return (weights.sigmoid() * (network(x) - y).square()).mean() + 0.01 * weights.sum() ** 2


class Lower(mlo.Problem):
    def training_step(self, batch):
        return fit(self, batch, self.deps.top.params["w"])


class Upper(mlo.Problem):
    def training_step(self, batch):
        x, y = batch
        return (self.deps.low(x) - y).square().mean() + 0.1 * self.params["w"].square().sum()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adam_with_decay": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1),
}


def build(method, optimizer, *, steps=7, **options):
    torch.manual_seed(0)
    low, top = Net(), nn.ParameterDict({"w": 0.1 * torch.randn(12)})
    lower_optimizer = OPTIMIZERS[optimizer](low.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(lower_optimizer, 0.9)
    return mlo.Engine(
        [
            Lower(
                "low",
                low,
                optimizer=lower_optimizer,
                scheduler=scheduler,
                data=data(),
                depends_on=["top"],
                steps=steps,
                hypergradient=method,
                **options,
            ),
            Upper(
                "top", top, optimizer=torch.optim.SGD(top.parameters(), lr=0.01), data=data()[:1], depends_on=["low"]
            ),
        ]
    )


class Bound:
    """Runs a network with tensors in the place of its parameters."""

    def __init__(self, network, tensors):
        self.network, self.tensors = network, tensors

    def __call__(self, x):
        return torch.func.functional_call(self.network, self.tensors, (x,))


def by_hand(optimizer, *, steps, window, clip=None, warm=0):
    """The hypergradient by one graph through the last `window` of `steps` steps, in a loop of plain autograd.

    Returns the hypergradients of `warm + 1` rounds; only the optimizer's formula is shared with the engine, and that
    is compared with torch.optim in tests of its own.
    """
    torch.manual_seed(0)
    low, top = Net(), nn.ParameterDict({"w": 0.1 * torch.randn(12)})
    lower_optimizer = OPTIMIZERS[optimizer](low.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(lower_optimizer, 0.9)
    upper_optimizer = torch.optim.SGD(top.parameters(), lr=0.01)
    batches, names = data(), [n for n, _ in low.named_parameters()]
    found, position = [], 0
    for _ in range(warm + 1):
        w = top["w"].detach().clone().requires_grad_()
        theta = {n: p.detach().clone() for n, p in low.named_parameters()}
        state = optimizer_state(lower_optimizer, list(low.parameters()))
        for step in range(steps):
            kept = step >= steps - window
            # Outside of the window nothing is remembered; where it begins, θ is a leaf.
            if not kept or step == steps - window:
                theta = {n: t.detach().requires_grad_() for n, t in theta.items()}
            batch = batches[position % 3]
            position += 1
            loss = fit(Bound(low, theta), batch, w if kept else w.detach())
            g = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
            if clip is not None:
                norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in g if t is not None]))
                g = [None if t is None else t * (clip / (norm + 1e-6)).clamp(max=1.0) for t in g]
            rule = differentiable_step(lower_optimizer, list(low.parameters()))
            after, state = rule.apply(list(theta.values()), g, state)
            if not kept:
                after = [t.detach() for t in after]
                state = type(state)(state.layout, tuple(t.detach() for t in state.tensors))
            for p, t in zip(low.parameters(), g, strict=True):
                p.grad = None if t is None else t.detach()
            lower_optimizer.step()  # moves the module, the state and the schedule on
            scheduler.step()
            theta = dict(zip(names, after, strict=True))
        x, y = batches[0]
        upper = (Bound(low, theta)(x) - y).square().mean() + 0.1 * w.square().sum()
        (gradient,) = torch.autograd.grad(upper, w)
        found.append(gradient)
        top["w"].grad = gradient
        upper_optimizer.step()
    return found


def upper_gradient(engine):
    engine.step()
    return engine.problems["top"].module["w"].grad.clone()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("window", [1, 4, 7])
def test_unrolling_is_autograd_through_the_loop(optimizer, window):
    rounds = by_hand(optimizer, steps=7, window=window, warm=2)  # warm-started, with optimizer state
    engine = build(mlo.Unroll(steps=None if window == 7 else window), optimizer)
    for expected in rounds:
        torch.testing.assert_close(upper_gradient(engine), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("keep_every", [1, 2, 3, 7, 50])
def test_where_states_are_kept_changes_nothing(keep_every):
    expected = upper_gradient(build(mlo.Unroll(keep_every=1), "adam"))
    found = upper_gradient(build(mlo.Unroll(keep_every=keep_every), "adam"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("keep_every", "most"), [(None, 3), (1, 1), (4, 4), (50, 10)])
def test_no_more_states_are_computed_again_than_stand_between_two_kept_ones(monkeypatch, keep_every, most):
    lengths = []
    again = _Sweep._forward_from

    def counted(self, first):
        points = again(self, first)
        lengths.append(len(points))
        return points

    monkeypatch.setattr(_Sweep, "_forward_from", counted)
    upper_gradient(build(mlo.Unroll(keep_every=keep_every), "adam", steps=10))
    assert sum(lengths) == 10
    assert max(lengths) == most


def test_gradient_clipping_is_part_of_the_step():
    for clip in (0.05, 1e3):
        expected = by_hand("momentum", steps=4, window=4, clip=clip)[0]
        found = upper_gradient(build(mlo.Unroll(), "momentum", steps=4, grad_clip=clip))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("product", "tolerance"), [(mlo.ForwardOverReverse(), 1e-10), (mlo.CentralDifferences(), 1e-6)]
)
def test_other_products(product, tolerance):
    expected = upper_gradient(build(mlo.Unroll(), "momentum"))
    found = upper_gradient(build(mlo.Unroll(product=product), "momentum"))
    assert ((found - expected).norm() / expected.norm()).item() < tolerance


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_differences_of_one_step_begin_with_its_own_gradients(optimizer):
    """Nesterov's momentum over lists of tensors writes to them: then they are formed again, as the norm shows."""
    rounds = by_hand(optimizer, steps=3, window=1, warm=1)
    found = {}
    for product in (mlo.DoubleBackward(), mlo.ForwardOverReverse()):
        engine = build(mlo.Unroll(steps=1, product=product), optimizer, steps=3)
        norms = []
        for expected in rounds:
            norms.append(engine.step()["top"].solves["top/low"].gradient_norm)
            gradient = engine.problems["top"].module["w"].grad
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)
        found[product] = norms
    double, forward = found.values()
    assert forward == pytest.approx(double, rel=1e-12)


@pytest.mark.parametrize(("clip", "evaluations"), [(None, 1 + 2), (1e3, 1 + 3)])
def test_differences_of_one_step_evaluate_its_gradient_no_second_time(clip, evaluations):
    product = mlo.CentralDifferences()
    engine = build(mlo.Unroll(steps=1, product=product), "sgd", steps=1, grad_clip=clip)
    calls = []
    engine.problems["low"].module.register_forward_hook(lambda *_: calls.append(1))
    engine.step()
    assert len(calls) == evaluations + 1  # and the upper problem's


def test_one_step_with_central_differences_is_the_second_order_formula_of_darts():
    engine = build(mlo.Unroll(steps=1, product=mlo.CentralDifferences(epsilon=0.01)), "sgd", steps=1)
    low, top = (engine.problems[n].module for n in ("low", "top"))
    low.eval()  # without dropout, so that the formula can be written down without replaying masks
    before = {n: p.detach().clone() for n, p in low.named_parameters()}
    w = top["w"].detach().clone().requires_grad_()
    found = upper_gradient(engine)
    batch, (x, y) = data()[0], data()[0]
    after = {n: p.detach().clone().requires_grad_() for n, p in low.named_parameters()}
    upper = (Bound(low, after)(x) - y).square().mean() + 0.1 * w.square().sum()
    direct, *v = torch.autograd.grad(upper, [w, *after.values()], allow_unused=True)
    v = [torch.zeros_like(p) if t is None else t for t, p in zip(v, after.values(), strict=True)]
    epsilon = 0.01 / torch.sqrt(sum(t.square().sum() for t in v))
    sides = []
    for sign in (1, -1):
        shifted = {n: p + sign * epsilon * t for (n, p), t in zip(before.items(), v, strict=True)}
        sides.append(torch.autograd.grad(fit(Bound(low, shifted), batch, w), w)[0])
    expected = direct - 0.1 * (sides[0] - sides[1]) / (2 * epsilon)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


class Task(mlo.Problem):
    """A task of MAML: starts at the meta-parameters and takes some steps."""

    def __init__(self, *args, target, **options):
        self.target = target
        super().__init__(*args, **options)

    def training_step(self, batch):
        return (self.params["a"] ** 2 * self.params["b"] - self.target).square().sum()


class Meta(mlo.Problem):
    def training_step(self, batch):
        return sum(
            (d.params["a"] * d.params["b"].sum() - 1.0).square().sum() for d in map(self.deps.__getitem__, self.deps)
        )


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("keep_every", [None, 1])
def test_maml_is_autograd_through_the_inner_loops(optimizer, keep_every):
    def module():
        return nn.ParameterDict({"a": torch.tensor([0.5, 1.0]), "b": torch.tensor([0.7, -0.3])})

    meta, targets = module(), [torch.tensor([0.3, 0.1]), torch.tensor([-0.2, 0.6])]
    stages = []
    for i, target in enumerate(targets):
        own = module()
        with torch.no_grad():
            own["a"].add_(7.0)  # where a task starts over from does not depend on where it is
        stages.append(
            Task(
                f"task_{i}",
                own,
                target=target,
                optimizer=OPTIMIZERS[optimizer](own.parameters()),
                depends_on={"origin": "meta"},
                start_from="origin",
                steps=5,
                hypergradient=mlo.Unroll(keep_every=keep_every),
            )
        )
    top = Meta("meta", meta, optimizer=torch.optim.SGD(meta.parameters(), lr=0.1), depends_on=[s.name for s in stages])
    engine = mlo.Engine([*stages, top])
    for _ in range(2):
        start = {n: p.detach().clone().requires_grad_() for n, p in meta.named_parameters()}
        total = 0.0
        for target in targets:
            fresh = module()
            inner = OPTIMIZERS[optimizer](fresh.parameters())
            theta, state = dict(start), optimizer_state(inner, list(fresh.parameters()))
            for _ in range(5):
                loss = (theta["a"] ** 2 * theta["b"] - target).square().sum()
                g = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
                after, state = differentiable_step(inner, list(fresh.parameters())).apply(
                    list(theta.values()), g, state
                )
                for p, t in zip(fresh.parameters(), g, strict=True):
                    p.grad = t.detach()
                inner.step()
                theta = dict(zip(theta, after, strict=True))
            total = total + (theta["a"] * theta["b"].sum() - 1.0).square().sum()
        expected = torch.autograd.grad(total, list(start.values()))
        engine.step()
        for p, t in zip(meta.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, t, rtol=1e-9, atol=1e-13)


def test_unrolled_and_implicit_stages_mix_in_a_chain():
    """w1 unrolled below w2 by a dense solve: the cotangent of w1 is that of the implicit stage above."""

    class First(mlo.Problem):
        def training_step(self, batch):
            return 0.5 * (self.params["w"] - self.deps.top.params["w"]).square().sum()

    class Second(mlo.Problem):
        def training_step(self, batch):
            return 0.5 * (self.params["w"] - 3 * self.deps.first.params["w"]).square().sum()

    class Top(mlo.Problem):
        def training_step(self, batch):
            return self.deps.second.params["w"].sum()

    def holder():
        return nn.ParameterDict({"w": torch.ones(2)})

    a, b, c = holder(), holder(), holder()
    engine = mlo.Engine(
        [
            First(
                "first",
                a,
                optimizer=torch.optim.SGD(a.parameters(), lr=0.25),
                depends_on=["top"],
                steps=3,
                hypergradient=mlo.Unroll(),
            ),
            Second(
                "second",
                b,
                optimizer=torch.optim.SGD(b.parameters(), lr=0.1),
                depends_on=["first"],
                hypergradient=mlo.Dense(),
            ),
            Top("top", c, optimizer=torch.optim.SGD(c.parameters(), lr=0.1), depends_on=["second"]),
        ]
    )
    engine.step()
    expected = 3 * (1 - 0.75**3)  # dw1/dtop after three steps at rate ¼ of a unit Hessian
    assert c["w"].grad.tolist() == pytest.approx([expected] * 2, rel=1e-12)
    solves = engine.step()["top"].solves
    assert (solves["top/first"].iterations, solves["top/first"].products) == (3, 2)


def test_the_hypergradient_between_steps_is_that_of_the_recorded_ones():
    engine = build(mlo.Unroll(), "adam")
    engine.step()
    first = engine.hypergradient("top")["w"]
    before = [p.detach().clone() for p in engine.problems["low"].module.parameters()]
    torch.testing.assert_close(engine.hypergradient("top")["w"], first, rtol=0, atol=0)
    assert all(torch.equal(p, q) for p, q in zip(engine.problems["low"].module.parameters(), before, strict=True))


def test_what_cannot_be_unrolled_is_refused():
    with pytest.raises(mlo.ConfigurationError, match=r"'low', hypergradient=Unroll\(steps=9\): expected at most the 7"):
        build(mlo.Unroll(steps=9), "sgd")
    with pytest.raises(mlo.ConfigurationError, match=r"steps=0.: expected an integer of at least 1, or None"):
        mlo.Unroll(steps=0)
    engine = build(mlo.Unroll(), "sgd")
    with pytest.raises(mlo.ConfigurationError, match=r"it has taken none yet. Call engine.step"):
        engine.hypergradient("top")
    engine.step()
    with torch.no_grad():
        engine.problems["low"].module.last.weight.add_(1.0)
    with pytest.raises(mlo.ConfigurationError, match=r"they were changed since"):
        engine.hypergradient("top")
    engine.step()
    OPTIMIZERS["rprop"] = lambda p: torch.optim.Rprop(p, lr=0.1)
    try:
        with pytest.raises(mlo.ConfigurationError, match=r"'low', hypergradient=Unroll: .*Rprop.*SGD, Adam"):
            build(mlo.Unroll(), "rprop")
    finally:
        del OPTIMIZERS["rprop"]
    with pytest.raises(mlo.ConfigurationError, match=r"which only an engine takes"):
        mlo.best_response(lambda w, x: (w - x).sum(), torch.ones(1), torch.ones(1, requires_grad=True), mlo.Unroll())


def test_starting_over_is_checked():
    with pytest.raises(mlo.ConfigurationError, match=r"'low', start_from: expected a role that depends_on declares"):
        build(mlo.Unroll(), "sgd", start_from="meta")
    with pytest.raises(
        mlo.ConfigurationError, match=r"start_from='top': expected a parameter 'unused' of shape \(2,\)"
    ):
        build(mlo.Unroll(), "sgd", start_from="top")


def test_a_loss_that_fails_in_the_middle_of_a_solve_leaves_no_half_record():
    engine = build(mlo.Unroll(), "adam")
    engine.step()
    lower = engine.problems["low"]
    calls, whole = [], lower.training_step

    def failing(batch):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("a fault of the user's")
        return whole(batch)

    lower.training_step = failing
    with pytest.raises(RuntimeError, match=r"a fault of the user's"):
        engine.step()
    with pytest.raises(mlo.ConfigurationError, match=r"the solve was interrupted"):
        engine.hypergradient("top")
    engine.step()
    engine.hypergradient("top")


# --- the optimizer's own preconditioner (SAMA) --------------------------------------------------------------------


@pytest.mark.parametrize("product", [mlo.DoubleBackward(), mlo.CentralDifferences()])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_adaptive_identity_is_the_derivative_of_the_next_step(optimizer, product):
    """By the exact mixed product and by central differences of the optimizer's own step in its gradient."""
    engine = build(mlo.AdaptiveIdentity(product=product), optimizer, steps=3)
    engine.step()
    low, top = (engine.problems[n].module for n in ("low", "top"))
    low.eval()
    found = engine.hypergradient("top")["w"]
    batch, (x, y) = data()[2], data()[0]
    parameters = [p for n, p in low.named_parameters() if n != "unused"]
    w = top["w"].detach().clone().requires_grad_()
    inner = torch.autograd.grad(fit(low, batch, w), parameters, create_graph=True)
    upper = (low(x) - y).square().mean()
    c = torch.autograd.grad(upper, parameters)
    adjoint = []
    optimizers = engine.problems["low"].optimizer
    for i, (p, g) in enumerate(zip(parameters, inner, strict=True)):
        change = torch.zeros_like(p).reshape(-1)
        for j in range(p.numel()):
            ends = []
            for sign in (1, -1):
                shift = torch.zeros(p.numel())
                shift[j] = sign * 1e-6
                ends.append(
                    after_one_step(optimizer, low, optimizers, i, g.detach() + shift.reshape(p.shape)).reshape(-1)[j]
                )
            change[j] = -(ends[0] - ends[1]) / 2e-6
        adjoint.append(change.reshape(p.shape) * c[i])
    (indirect,) = torch.autograd.grad(inner, w, adjoint)
    expected = 0.2 * top["w"].detach() - indirect
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6
    assert indirect.norm() > 1e-4 * expected.norm()


def after_one_step(name, module, optimizer, index, gradient):
    """The parameter number `index` after a step of a copy of the optimizer with this gradient."""
    other = copy.deepcopy(module)
    parameters = list(other.parameters())
    twin = OPTIMIZERS[name](parameters)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    named = [p for n, p in other.named_parameters() if n != "unused"]
    named[index].grad = gradient
    twin.step()
    return named[index].detach()


def test_the_adaptive_identity_of_plain_sgd_is_the_learning_rate():
    a = upper_gradient(build(mlo.AdaptiveIdentity(), "sgd"))
    b = upper_gradient(build(mlo.Identity(scale=None), "sgd"))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_the_adaptive_identity_needs_an_optimizer_that_is_known():
    OPTIMIZERS["rprop"] = lambda p: torch.optim.Rprop(p, lr=0.1)
    try:
        with pytest.raises(mlo.ConfigurationError, match=r"'low', hypergradient=AdaptiveIdentity: .*Rprop"):
            build(mlo.AdaptiveIdentity(), "rprop")
    finally:
        del OPTIMIZERS["rprop"]


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_the_adaptive_identity_of_a_stage_that_maximises(decay):
    """∂θ⁺/∂x of Adagrad's next step, written out: g ← −∂L/∂w + ρw, v ← 3 + g², w ← w − η g/√v."""

    class Stage(mlo.Problem):
        def training_step(self, batch):
            w = self.params["w"]
            return (w * self.deps.top.params["x"].sin() - w**2).sum()

    class Top(mlo.Problem):
        def training_step(self, batch):
            return self.deps.stage.params["w"].sum()

    low, top = torch.nn.ParameterDict({"w": torch.tensor([0.7])}), torch.nn.ParameterDict({"x": torch.tensor([0.4])})
    options = {"initial_accumulator_value": 3.0, "eps": 0.0, "maximize": True, "weight_decay": decay}
    optimizer = torch.optim.Adagrad(low.parameters(), lr=0.8, **options)
    stage = Stage("stage", low, optimizer=optimizer, depends_on=["top"], hypergradient=mlo.AdaptiveIdentity())
    found = mlo.Engine([stage, Top("top", top, depends_on=["stage"])]).hypergradient("top")["x"]

    w, x = torch.tensor([0.7]), torch.tensor([0.4], requires_grad=True)
    g = -(x.sin() - 2 * w) + decay * w
    (expected,) = torch.autograd.grad(w - 0.8 * g / (3 + g**2).sqrt(), x)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert abs(expected.item()) > 0.1
