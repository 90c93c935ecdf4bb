"""Methods that follow the solution instead of computing it, and such as need first derivatives only."""

from itertools import pairwise

import pytest
import torch

import mlo
from tests import zoo
from tests.test_hypergradient_closed_form import neumann_inverse
from tests.test_products import hypergradient
from tests.test_solvers import solved


@pytest.mark.parametrize("topology", zoo.TOPOLOGIES)
def test_a_penalty_on_a_quadratic_is_the_neumann_series(topology):
    for steps in (1, 2, 7):
        stages, top = zoo.TOPOLOGIES[topology](mlo.F2SA(steps=steps, scale=0.15, multiplier=10.0))
        engine = mlo.Engine([*stages, top])
        expected = zoo.exact_hypergradient(stages, top, neumann_inverse(steps, 0.15))
        assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-10


@pytest.mark.parametrize("topology", zoo.TOPOLOGIES)
def test_a_penalty_converges_to_the_implicit_gradient(topology):
    stages, top = zoo.TOPOLOGIES[topology](mlo.F2SA(steps=400, scale=0.2))
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top)
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-6


def test_the_error_of_a_penalty_is_of_first_order_in_its_inverse():
    x = torch.tensor([1.0, -2.0], requires_grad=True)

    def error(multiplier):
        method = mlo.F2SA(steps=500, scale=0.2, multiplier=multiplier)
        w = mlo.best_response(lambda w, x: (torch.cosh(w) - w * x).sum(), torch.asinh(x.detach()), x, method)
        exact = 1 / torch.sqrt(1 + x.detach() ** 2)
        return zoo.relative_error(torch.autograd.grad(w.sum(), x)[0], exact)

    errors = [error(10.0**k) for k in (2, 3, 4)]
    assert errors[0] < 1e-2
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([10, 10], rel=0.05)


@pytest.mark.filterwarnings("ignore::mlo.BreakdownWarning")  # the network's Hessian need not be definite
def test_a_penalty_knows_decay_groups_and_maximisation():
    a = hypergradient(mlo.F2SA(steps=5))
    b = hypergradient(mlo.Neumann(terms=5, rtol=0.0))
    assert zoo.relative_error(a, b) < 1e-4


def test_a_penalty_that_diverges_is_reported():
    stages, top = zoo.two_levels(mlo.F2SA(steps=60, scale=10.0, on_breakdown="raise"))
    with pytest.raises(mlo.BreakdownError, match="F2SA DIVERGED"):
        mlo.Engine([*stages, top]).hypergradient("top")


@pytest.mark.parametrize("steps", [1, 3])
def test_soba_follows_the_linear_system_from_step_to_step(steps):
    """At fixed θ and x, k outer steps of it are a Neumann series of k·steps terms."""
    stages, top = zoo.two_levels(mlo.SOBA(steps=steps, scale=0.15))
    engine = mlo.Engine([*stages, top])
    zoo.solve_in_order(stages, top)
    for p in (*stages, top):
        p.optimizer.param_groups[0]["lr"] = 0.0
    for k in range(1, 5):
        expected = zoo.exact_hypergradient(stages, top, neumann_inverse(k * steps, 0.15))
        report = engine.step()["top"].solves["top/w"]
        found = zoo.flat({n: p.grad for n, p in top.module.named_parameters() if p.grad is not None})
        assert zoo.relative_error(found, expected) < 1e-10
        assert (report.iterations, report.products) == (steps, steps)


def test_soba_reports_the_residual_before_its_last_step():
    matrix, rhs = zoo.spd(4), 5 * torch.randn(4)
    result = solved(mlo.SOBA(steps=3, scale=0.1), matrix, rhs)
    before = torch.linalg.matrix_power(torch.eye(4) - 0.1 * matrix, 2) @ rhs
    assert result.residual == pytest.approx((before.norm() / rhs.norm()).item(), rel=1e-12)
    assert (result.status, result.iterations, result.products) == (mlo.Status.TRUNCATED, 3, 3)


def test_soba_starts_again_from_zero_once_it_has_diverged():
    """H = 2 and a step of 10: the residual 1 − 2λ grows by −19 per step, past a thousand times c in the fourth."""
    kept, found = {}, []
    for step in range(5):
        x = torch.tensor(3.0, requires_grad=True)
        method = mlo.SOBA(scale=10.0, on_breakdown="raise")
        w = mlo.best_response(lambda w, x: w**2 - w * x, x.detach() / 2, x, method, warm_starts=kept)
        if step == 3:
            with pytest.raises(mlo.BreakdownError) as caught:
                w.backward()
            assert caught.value.report.status is mlo.Status.DIVERGED
            assert caught.value.report.relative_residual == pytest.approx(19**3, rel=1e-12)
        else:
            found.append(torch.autograd.grad(w, x)[0].item())
    assert found == pytest.approx([10.0, -180.0, 3430.0, 10.0], rel=1e-12)


def test_soba_trains_to_the_exact_optimum():
    """All three variables move at once, and come to rest where the exact hypergradient vanishes."""
    curvature, t = zoo.spd(3), torch.randn(3)

    class Lower(mlo.Problem):
        def training_step(self, batch):
            w = self.params["w"]
            return 0.5 * w @ curvature @ w - w @ self.deps.top.params["x"]

    class Upper(mlo.Problem):
        def training_step(self, batch):
            return 0.5 * (self.deps.low.params["w"] - t).square().sum() + 0.05 * self.params["x"].square().sum()

    low, top = torch.nn.ParameterDict({"w": torch.zeros(3)}), torch.nn.ParameterDict({"x": torch.zeros(3)})
    engine = mlo.Engine(
        [
            Lower(
                "low",
                low,
                optimizer=torch.optim.SGD(low.parameters(), lr=0.1),
                depends_on=["top"],
                hypergradient=mlo.SOBA(),
            ),
            Upper("top", top, optimizer=torch.optim.SGD(top.parameters(), lr=0.1), depends_on=["low"]),
        ]
    )
    reports = engine.run(3000)
    inverse = torch.linalg.inv(curvature)
    expected = torch.linalg.solve(inverse @ inverse + 0.1 * torch.eye(3), inverse @ t)
    torch.testing.assert_close(top["x"].detach(), expected, rtol=1e-8, atol=1e-10)
    assert reports["top"].solves["top/low"].products == 1


def test_soba_needs_a_place_to_keep_its_vector():
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(mlo.ConfigurationError, match="warm_starts="):
        mlo.best_response(lambda w, x: (w - x).square().sum(), torch.ones(1), x, mlo.SOBA(scale=0.1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlo.SOBA(steps=0), r"steps=0\): expected an integer of at least 1"),
        (lambda: mlo.SOBA(scale=-1.0), r"scale=-1.0\): expected a positive number"),
        (lambda: mlo.F2SA(steps=0), r"steps=0\): expected an integer"),
        (lambda: mlo.F2SA(multiplier=0.0), r"multiplier=0.0\): expected a positive number"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(mlo.ConfigurationError, match=message):
        make()
