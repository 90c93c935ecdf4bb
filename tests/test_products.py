"""Every way to form products, under every inverse, against closed forms and against each other."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import mlo
from mlo.products.directional import shift_length
from tests import zoo

FIRST_ORDER = [mlo.ForwardOverReverse(), mlo.CentralDifferences()]
TOLERANCE = {mlo.ForwardOverReverse: 1e-12, mlo.CentralDifferences: 1e-6}
INVERSES = {
    "ConjugateGradient": lambda **o: mlo.ConjugateGradient(rtol=1e-9, **o),
    "Dense": mlo.Dense,
    "Neumann": lambda **o: mlo.Neumann(terms=9, scale=0.15, **o),
    "Identity": lambda **o: mlo.Identity(scale=None, **o),
}


def kind(value):
    return type(value).__name__


@pytest.mark.parametrize("topology", zoo.TOPOLOGIES)
@pytest.mark.parametrize("product", FIRST_ORDER, ids=kind)
def test_exact_methods_with_every_product(topology, product):
    for method in (mlo.ConjugateGradient(rtol=1e-9, product=product), mlo.Dense(product=product)):
        stages, top = zoo.TOPOLOGIES[topology](method)
        engine = mlo.Engine([*stages, top])
        expected = zoo.exact_hypergradient(stages, top)
        assert zoo.relative_error(zoo.by_engine(engine, top), expected) < max(1e-8, TOLERANCE[type(product)])


class Fit(mlo.Problem):
    """A network that follows another one; its optimizer adds L2 decay, and maximises in one of its groups."""

    def training_step(self, batch):
        x = batch
        gap = self(x) - self.deps.top(x)
        pull = sum(p.square().sum() * (-1 if n.startswith("rival") else 1) for n, p in self.params.items())
        return gap.square().mean() + 0.2 * pull


class Upper(mlo.Problem):
    def training_step(self, batch):
        return self.deps.low(batch).pow(3).mean() + (self.deps.low(batch) * self(batch)).mean()


class Net(nn.Module):
    """Dropout, batch normalisation, a parameter that is maximised, one that is frozen and one that is unused."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.drop = nn.Dropout(0.3)
        self.rival = nn.Parameter(0.1 * torch.randn(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.last(self.drop(self.norm(torch.tanh(self.first(x))))) * self.frozen + self.rival


def hypergradient(method):
    torch.manual_seed(0)
    module, upper = Net(), nn.Linear(3, 1)
    data = torch.randn(20, 3)
    kept = [p for n, p in module.named_parameters() if n != "rival"]
    groups = [{"params": kept, "lr": 0.2, "weight_decay": 0.3}, {"params": [module.rival], "maximize": True}]
    low = Fit(
        "low", module, data=[data], optimizer=torch.optim.SGD(groups, lr=0.05), depends_on=["top"], hypergradient=method
    )
    top = Upper("top", upper, optimizer=torch.optim.SGD(upper.parameters(), lr=0.1), data=[data], depends_on=["low"])
    engine = mlo.Engine([low, top])
    engine.run(2)
    before = {n: b.clone() for n, b in module.named_buffers()}
    found = engine.hypergradient("top")
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
    return torch.cat([t.reshape(-1) for t in found.values()])


@pytest.mark.filterwarnings("ignore::mlo.BreakdownWarning")  # the network's Hessian need not be definite
@pytest.mark.parametrize("product", FIRST_ORDER, ids=kind)
@pytest.mark.parametrize("inverse", ["Dense", "Neumann", "Identity"])
def test_products_agree_on_a_network(inverse, product):
    """With dropout, batch normalisation, weight decay and a group that maximises: H is then not symmetric."""
    expected = hypergradient(INVERSES[inverse]())
    assert (
        zoo.relative_error(hypergradient(INVERSES[inverse](product=product)), expected) < 1e2 * TOLERANCE[type(product)]
    )
    assert expected.norm() > 1e-3


def test_a_loss_that_asks_which_parameters_need_a_gradient_is_the_same_for_both_exact_products():
    """As weight decay commonly does; the penalty then holds part of the mixed product."""

    class Decayed(mlo.Problem):
        def training_step(self, batch):
            penalty = self.deps.top.params["x"].exp()
            (weight,) = (p for p in self.module.parameters() if p.requires_grad)
            return (
                (self(batch) - 1).square().mean()
                + (penalty * self.params["weight"] ** 2).sum()
                + (penalty * weight**4).sum()
            )

    class Norm(mlo.Problem):
        def training_step(self, batch):
            return (self.deps.low.params["weight"] - 1).square().sum()

    found = []
    for product in (mlo.DoubleBackward(), mlo.ForwardOverReverse()):
        torch.manual_seed(0)
        net, method = nn.Linear(3, 1, bias=False), mlo.ConjugateGradient(product=product)
        low = Decayed("low", net, data=[torch.randn(8, 3)], depends_on=["top"], hypergradient=method)
        top = Norm("top", nn.ParameterDict({"x": torch.zeros(3)}), depends_on=["low"])
        found.append(mlo.Engine([low, top]).hypergradient("top")["x"])
    assert zoo.relative_error(*found) < 1e-12


def test_finite_difference_is_the_identity_with_central_differences():
    a = hypergradient(mlo.FiniteDifference())
    b = hypergradient(mlo.Identity(scale=None, product=mlo.CentralDifferences()))
    assert zoo.relative_error(a, b) < 1e-8
    c = hypergradient(mlo.FiniteDifference(scale=0.7, epsilon=1e-4))
    d = hypergradient(mlo.Identity(scale=0.7, product=mlo.CentralDifferences(epsilon=1e-4)))
    assert zoo.relative_error(c, d) < 1e-10


@pytest.mark.parametrize("product", FIRST_ORDER, ids=kind)
def test_products_without_a_derivative_are_refused_in_nested_graphs(product):
    def problem(name, reads, method=None):
        return zoo.Quadratic(name, reads=reads, hypergradient=method)

    def engine(low, mid):
        return mlo.Engine(
            [problem("low", ["mid", "top"], low), problem("mid", ["low", "top"], mid), problem("top", ["mid", "low"])]
        )

    with pytest.raises(mlo.GraphError, match=r"'mid', hypergradient=ConjugateGradient: its own loss reads"):
        engine(None, mlo.ConjugateGradient(product=product))
    with pytest.raises(mlo.GraphError, match=r"'low', hypergradient=Neumann: .* needs a derivative of this method"):
        engine(mlo.Neumann(scale=0.1, product=product), None)


@pytest.mark.parametrize("product", FIRST_ORDER, ids=kind)
def test_a_second_derivative_is_refused_and_never_zero(product):
    x = torch.ones(2, requires_grad=True)
    w = mlo.best_response(
        lambda w, x: (w - x**2).square().sum(), torch.ones(2), x, mlo.ConjugateGradient(product=product, rtol=1e-6)
    )
    (first,) = torch.autograd.grad(w.sum(), x, create_graph=True)
    assert first.tolist() == pytest.approx([2.0, 2.0], rel=1e-6)
    with pytest.raises(
        mlo.ConfigurationError, match=r"ConjugateGradient at stage 'best_response' is differentiated again"
    ):
        torch.autograd.grad(first.sum(), x)


class Square(torch.autograd.Function):
    """x² with a first derivative only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def pullback_of_squares(product, power=1):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    method = mlo.ConjugateGradient(product=product, rtol=1e-8)

    def loss(w, x):  # w* = x / 2 for power 1
        return Square.apply(w).pow(power).sum() - (w * x).sum()

    return torch.autograd.grad(mlo.best_response(loss, x.detach() / 2, x, method).sum(), x)[0]


def test_modules_with_first_derivatives_only():
    assert pullback_of_squares(mlo.CentralDifferences()).tolist() == pytest.approx([0.5, 0.5], rel=1e-6)
    for power in (1, 2):  # torch itself raises an error for power 2 only, and returns zero for power 1
        with pytest.raises(mlo.EvaluationError, match=r"second derivative .*CentralDifferences"):
            pullback_of_squares(mlo.DoubleBackward(), power)
    with pytest.raises(mlo.EvaluationError, match=r"second derivative .*CentralDifferences"):
        pullback_of_squares(mlo.ForwardOverReverse())


def test_a_first_order_operation_in_an_engine_is_refused_with_the_problem_named():
    class Squares(mlo.Problem):
        def training_step(self, batch):
            w = self.params["w"]
            return Square.apply(w).sum() - (w * self.deps.top.params["w"]).sum()

    class Sum(mlo.Problem):
        def training_step(self, batch):
            return self.deps.low.params["w"].sum()

    def engine(method):
        low, top = (nn.ParameterDict({"w": torch.ones(2)}) for _ in range(2))
        return mlo.Engine(
            [Squares("low", low, depends_on=["top"], hypergradient=method), Sum("top", top, depends_on=["low"])]
        )

    with pytest.raises(mlo.EvaluationError, match=r"'low'.* second derivative that Dense needs"):
        engine(mlo.Dense()).hypergradient("top")
    method = mlo.Dense(product=mlo.CentralDifferences())
    assert engine(method).hypergradient("top")["w"].tolist() == pytest.approx([0.5, 0.5], rel=1e-7)


def test_attention_by_central_differences_is_attention_by_double_backward():
    q = torch.randn(1, 2, 4, 3)

    def pull(product, math):
        x = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)

        def loss(w, x):
            kernels = (
                [torch.nn.attention.SDPBackend.MATH]
                if math
                else list(torch.nn.attention.SDPBackend.__members__.values())
            )
            with torch.nn.attention.sdpa_kernel([k for k in kernels if k.name != "ERROR"]):
                out = F.scaled_dot_product_attention(q * w, q, q * w)
            return out.square().sum() + 2 * (w - x).square().sum()

        solution = torch.tensor([0.2, -0.1, 0.4])
        w = mlo.best_response(loss, solution, x, mlo.Dense(product=product))
        return torch.autograd.grad(w.pow(2).sum(), x)[0]

    expected = pull(mlo.DoubleBackward(), math=True)
    assert zoo.relative_error(pull(mlo.CentralDifferences(), math=False), expected) < 1e-7
    assert zoo.relative_error(pull(mlo.ForwardOverReverse(), math=True), expected) < 1e-12


@pytest.mark.parametrize("product", [mlo.DoubleBackward(), *FIRST_ORDER], ids=kind)
@pytest.mark.parametrize(
    "method",
    [
        lambda p: mlo.ConjugateGradient(product=p, rtol=1e-6),
        lambda p: mlo.Unroll(product=p),
        lambda p: mlo.F2SA(scale=0.01),
        lambda p: mlo.FiniteDifference(scale=0.01),
    ],
    ids=["ConjugateGradient", "Unroll", "F2SA", "FiniteDifference"],
)
def test_how_far_a_stage_is_from_solved_stands_in_the_report(method, product):
    stages, top = zoo.two_levels(method(product))
    engine = mlo.Engine([*stages, top])
    zoo.solve_in_order(stages, top)
    stage = stages[0]
    values = {"top": zoo.flat(dict(top.module.named_parameters())).detach()}
    zoo.assign(stage.module, torch.ones(6))
    stage.optimizer.param_groups[0].update(lr=0.0, weight_decay=0.3)  # it stays where it is
    summary = engine.step()["top"].solves["top/w"]
    expected = ((stage.hessian + 0.3 * torch.eye(6)) @ torch.ones(6) - stage.right_side(values)).norm().item()
    if isinstance(stage.hypergradient, mlo.FiniteDifference):  # it forms gradients in x only
        assert summary.gradient_norm is None
    else:
        assert summary.gradient_norm == pytest.approx(expected, rel=1e-10)


def test_a_breakdown_outside_of_training_says_how_far_the_stage_is_from_solved():
    """The norm is formed only where somebody reads it; a report in an exception is read."""
    stages, top = zoo.two_levels(mlo.ConjugateGradient(damping=0.0, on_breakdown="raise"))
    stage = stages[0]
    stage.hessian = -torch.eye(6)
    engine = mlo.Engine([*stages, top])
    zoo.assign(stage.module, torch.ones(6))
    with pytest.raises(mlo.BreakdownError, match="NEGATIVE_CURVATURE") as caught:
        engine.hypergradient("top")
    values = {"top": zoo.flat(dict(top.module.named_parameters())).detach()}
    expected = (-torch.ones(6) - stage.right_side(values)).norm().item()
    assert caught.value.report.gradient_norm == pytest.approx(expected, rel=1e-10)


def test_an_unrolled_stage_reports_the_gradient_before_its_last_step():
    class Lower(mlo.Problem):
        def training_step(self, batch):
            return 0.5 * (self.params["w"] - self.deps.top.params["w"]).square().sum()

    class Upper(mlo.Problem):
        def training_step(self, batch):
            return self.deps.low.params["w"].sum()

    low, top = (nn.ParameterDict({"w": torch.tensor([v])}) for v in (1.0, 0.0))
    sgd = torch.optim.SGD(low.parameters(), lr=0.5)
    for keep_every in (1, 2, None):
        with torch.no_grad():
            low["w"].fill_(1.0)
        stage = Lower(
            "low", low, optimizer=sgd, depends_on=["top"], steps=4, hypergradient=mlo.Unroll(keep_every=keep_every)
        )
        upper = Upper("top", top, optimizer=torch.optim.SGD(top.parameters(), lr=0.0), depends_on=["low"])
        summary = mlo.Engine([stage, upper]).step()["top"].solves["top/low"]
        assert summary.gradient_norm == pytest.approx(0.5**3, rel=1e-12)


def test_products_are_checked():
    with pytest.raises(mlo.ConfigurationError, match=r"product=.*expected DoubleBackward"):
        mlo.Dense(product="double_backward")
    with pytest.raises(mlo.ConfigurationError, match=r"epsilon=0\): expected a positive number"):
        mlo.CentralDifferences(epsilon=0)


def test_a_parameter_in_which_the_gradient_is_constant_has_a_row_of_zeros():
    """½a² + b·x: the gradient in b is x, which no parameter moves. Two terms of Neumann at c = (1, 1) with S = ¼."""
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    at = torch.tensor(0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    a, b = mlo.best_response(
        lambda w, x: 0.5 * (w[0] - x) ** 2 + w[1] * x, at, x, mlo.Neumann(terms=2, scale=0.25, rtol=0.0)
    )
    # λ = ¼ (1 + ¾, 1 + 1), and ∂²L/∂w∂x = (−1, 1)
    (found,) = torch.autograd.grad(a + b, x)
    assert found.item() == pytest.approx(0.25 * (1.75 - 2.0), rel=1e-12)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize(
    "method", [mlo.FiniteDifference(scale=0.5), mlo.Identity(0.5, product=mlo.CentralDifferences())]
)
def test_a_side_that_does_not_reach_an_input_counts_as_zero(method, side):
    """w² + wx for w of one sign alone: ∂L/∂x is w there and nothing on the other side, ½ on the average of the two."""
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    at = torch.tensor(0.0, dtype=torch.float64)
    response = mlo.best_response(lambda w, x: w**2 + w * x if w * side > 0 else w**2, at, x, method)
    (found,) = torch.autograd.grad(response, x)
    assert found.item() == pytest.approx(-0.5 * 0.5, rel=1e-9)


class Linearised(mlo.HypergradientMethod):
    """Notes the gradient of a linearisation, and the matrices whose products it forms."""

    def __init__(self, product):
        super().__init__()
        object.__setattr__(self, "product", product)
        object.__setattr__(self, "seen", {})

    def pullback(self, stage, cotangents, solution, inputs, needed):
        units = [tuple(row.split([1, 2])) for row in torch.eye(3)]
        with self.product.linearised(stage, solution, inputs, needed) as linearisation:
            self.seen["gradient"] = torch.cat(linearisation.gradient).detach()
            for name in ("transposed_product", "product"):
                columns = [torch.cat(getattr(linearisation, name)(unit)) for unit in units]
                self.seen[name] = torch.stack(columns, dim=1)
        return tuple(torch.zeros_like(x) for x in inputs)


@pytest.mark.parametrize("product", [mlo.DoubleBackward(), *FIRST_ORDER], ids=kind)
def test_gradient_and_both_products_know_signs_and_decay(product):
    """H = S A + ρ for L = ½ θᵀ A θ, S the signs of a group that minimises and one that maximises, and ρ its decays."""
    a = zoo.spd(3)

    class Stage(mlo.Problem):
        def training_step(self, batch):
            theta = torch.cat([self.params["down"], self.params["up"]])
            return 0.5 * theta @ a @ theta - theta.sum() * self.deps.top.params["x"]

    class Top(mlo.Problem):
        def training_step(self, batch):
            return self.deps.stage.params["down"].sum()

    low = torch.nn.ParameterDict({"down": torch.randn(1), "up": torch.randn(2)})
    top = torch.nn.ParameterDict({"x": torch.zeros(())})
    groups = [
        {"params": [low["down"]], "weight_decay": 0.3},
        {"params": [low["up"]], "maximize": True, "weight_decay": 0.1},
    ]
    method = Linearised(product)
    sgd = torch.optim.SGD(groups, lr=0.1)
    stage = Stage("stage", low, optimizer=sgd, depends_on=["top"], hypergradient=method)
    mlo.Engine([stage, Top("top", top, depends_on=["stage"])]).hypergradient("top")
    matrix = torch.diag(torch.tensor([1.0, -1.0, -1.0])) @ a + torch.diag(torch.tensor([0.3, 0.1, 0.1]))
    theta = torch.cat([low["down"], low["up"]]).detach()
    assert zoo.relative_error(method.seen["gradient"], matrix @ theta) < 1e-14
    assert zoo.relative_error(method.seen["product"], matrix.T) < 1e-8
    assert zoo.relative_error(method.seen["transposed_product"], matrix) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.1, 50.0])
def test_the_length_of_a_shift_is_what_the_docstring_says(dtype, size):
    unit = torch.finfo(dtype).eps
    expected = max(unit ** (1 / 3) / 32, 32 * unit) * max(1.0, size)
    assert shift_length([torch.full((4,), size / 2, dtype=dtype)]) == pytest.approx(expected, rel=4 * unit)
