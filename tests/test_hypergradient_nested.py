"""Truly nested graphs: closed forms for quadratics, re-solving at shifted upper parameters for the others.

The reference solves each level by Newton's method with derivatives of its own: an exactly solved θ* is
given derivatives of any order by a few further Newton steps that autograd sees. Nothing of it is shared with
the library.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo
from tests import zoo

N = 3


class Level(mlo.Problem):
    """One level with a vector parameter `v` split in two tensors; `function(own, others)` is its loss."""

    def __init__(self, name, function, reads, method=None, n=N):
        module = nn.ParameterDict({"a": torch.randn(n - 1), "b": torch.randn(())})
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        super().__init__(name, module, optimizer=optimizer, depends_on=reads, hypergradient=method)
        self.function = function

    def training_step(self, batch):
        return self.function(joined(self.params), {d: joined(self.deps[d].params) for d in self.depends_on})


def joined(params):
    return torch.cat([params["a"], params["b"].reshape(1)])


def put(problem, value):
    with torch.no_grad():
        problem.module["a"].copy_(value[:-1])
        problem.module["b"].copy_(value[-1])


class Reference:
    """Nested minimisation of `levels` (lowest first) by Newton's method; the last one is the upper problem."""

    def __init__(self, levels, derivative_steps):
        self.names = [p.name for p in levels]
        self.functions = {p.name: p.function for p in levels}
        self.reads = {p.name: tuple(p.depends_on) for p in levels}
        self.derivative_steps = derivative_steps

    def lower(self, name, given):
        """The solutions of all levels below `name` as functions of `given`, the values of `name` and above."""
        values = dict(given)
        for lower in reversed(self.names[: self.names.index(name)]):
            values[lower] = self.solve(lower, values)
        return values

    def reduced(self, name, own, given):
        values = self.lower(name, {**given, name: own})
        return self.functions[name](own, {d: values[d] for d in self.reads[name]})

    def newton_step(self, name, x, given, create_graph):
        x = x if x.requires_grad else x.requires_grad_()
        g = torch.autograd.grad(self.reduced(name, x, given), x, create_graph=True)[0]
        rows = [torch.autograd.grad(gi, x, create_graph=create_graph, retain_graph=True)[0] for gi in g]
        return x - torch.linalg.solve(torch.stack(rows), g), g

    def solve(self, name, given):
        constant = {k: v.detach() for k, v in given.items()}
        x = torch.zeros(N)
        for _ in range(60):
            x, g = self.newton_step(name, x.detach(), constant, False)
            if g.norm() < 1e-14:
                break
        x = x.detach()
        if any(v.requires_grad for v in given.values()):
            for _ in range(self.derivative_steps):
                x, _ = self.newton_step(name, x, given, True)
        return x

    def hypergradient(self, x, epsilon=1e-4):
        """Re-solve everything at shifted x; central differences of fourth order."""
        name = self.names[-1]

        def value(shift):
            return self.reduced(name, x + shift, {}).detach()

        def slope(e):
            return (
                8 * (value(epsilon * e) - value(-epsilon * e)) - (value(2 * epsilon * e) - value(-2 * epsilon * e))
            ) / (12 * epsilon)

        return torch.stack([slope(e) for e in torch.eye(len(x))])


def non_quadratic_levels(depth, method):
    """`depth` levels, each reading every other one: t{depth} is the lowest, t1 the uppermost."""
    names = [f"t{i}" for i in range(depth, 0, -1)]
    levels = []
    for i, name in enumerate(names):
        s, couplings = zoo.spd(N, shift=1.5), {d: 0.5 * torch.randn(N, N) for d in names if d != name}

        def function(own, others, *, s=s, couplings=couplings, i=i):
            loss = 0.5 * own @ s @ own + torch.cosh(0.5 * own).sum() + (own**4).sum() / 24
            for d, b in couplings.items():
                loss = loss - own @ b @ torch.sin(others[d])
                if names.index(d) < i:  # a lower level also enters on its own, and by its distance
                    loss = loss + 0.3 * ((others[d] - 0.3 * own) ** 2).sum()
            return loss

        levels.append(Level(name, function, [d for d in names if d != name], method))
    return levels


METHODS = [mlo.ConjugateGradient(rtol=1e-12), mlo.Dense(), mlo.Neumann(terms=400, scale=0.2, rtol=1e-12)]


@pytest.mark.parametrize("method", METHODS)
def test_three_non_quadratic_levels_equal_resolving(method):
    levels = non_quadratic_levels(3, method)
    reference = Reference(levels, derivative_steps=2)
    engine = mlo.Engine(levels)
    top = levels[-1]
    x = joined(dict(top.module.named_parameters())).detach()
    solution = reference.lower(top.name, {top.name: x})
    for level in levels[:-1]:
        put(level, solution[level.name])
    expected = reference.hypergradient(x)
    assert zoo.relative_error(joined(engine.hypergradient(top.name)), expected) < 1e-8


def test_partial_hessians_would_be_wrong_on_these_levels():
    """What a sum over paths gives, so that the test above can fail: the lower response held fixed at level two."""
    levels = non_quadratic_levels(3, mlo.ConjugateGradient())
    reference = Reference(levels, derivative_steps=2)
    x = joined(dict(levels[-1].module.named_parameters())).detach()
    s = reference.lower("t1", {"t1": x})
    x = x.requires_grad_()
    low, mid, top = (level.function for level in levels)
    t3 = mlo.best_response(lambda v, d: low(v, {"t2": d[0], "t1": d[1]}), s["t3"], (s["t2"], x), mlo.Dense())
    t2 = mlo.best_response(lambda v, d: mid(v, {"t3": d[0], "t1": d[1]}), s["t2"], (t3, x), mlo.Dense())
    t3 = mlo.best_response(lambda v, d: low(v, {"t2": d[0], "t1": d[1]}), s["t3"], (t2, x), mlo.Dense())
    (paths,) = torch.autograd.grad(top(x, {"t3": t3, "t2": t2}), x)
    assert zoo.relative_error(paths, reference.hypergradient(x.detach())) > 1e-3


def test_four_non_quadratic_levels_equal_resolving():
    levels = non_quadratic_levels(4, mlo.ConjugateGradient(rtol=1e-11))
    reference = Reference(levels, derivative_steps=2)
    engine = mlo.Engine(levels)
    top = levels[-1]
    x = joined(dict(top.module.named_parameters())).detach()
    solution = reference.lower(top.name, {top.name: x})
    for level in levels[:-1]:
        put(level, solution[level.name])
    expected = reference.hypergradient(x)
    assert zoo.relative_error(joined(engine.hypergradient(top.name)), expected) < 1e-6


def quadratic_levels(method):
    """z minimises ½zᵀAz − zᵀ(By + Cx), y minimises ½yᵀDy + ½‖z − Ey‖² − yᵀFx, x reads both."""
    a, d, h = zoo.spd(N), zoo.spd(N), zoo.spd(N)
    b, c, e, f, k = (0.4 * torch.randn(N, N) for _ in range(5))
    target = torch.randn(N)
    levels = [
        Level("z", lambda z, o: 0.5 * z @ a @ z - z @ (b @ o["y"] + c @ o["x"]), ["y", "x"], method),
        Level(
            "y",
            lambda y, o: 0.5 * y @ d @ y + 0.5 * (o["z"] - e @ y).square().sum() - y @ f @ o["x"],
            ["z", "x"],
            method,
        ),
        Level(
            "x",
            lambda x, o: 0.5 * x @ h @ x + 0.5 * (o["z"] - target).square().sum() + x @ k @ o["y"],
            ["z", "y"],
        ),
    ]
    zy, zx = torch.linalg.solve(a, b), torch.linalg.solve(a, c)  # z = zy·y + zx·x
    m = zy - e
    yx = torch.linalg.solve(d + m.T @ m, f - m.T @ zx)  # y = yx·x
    total = zy @ yx + zx
    x = joined(dict(levels[-1].module.named_parameters())).detach()
    y, z = yx @ x, total @ x
    put(levels[1], y)
    put(levels[0], z)
    exact = h @ x + k @ y + yx.T @ k.T @ x + total.T @ (z - target)
    return levels, exact


@pytest.mark.parametrize("method", METHODS)
def test_three_quadratic_levels_equal_the_closed_form(method):
    levels, exact = quadratic_levels(method)
    engine = mlo.Engine(levels)
    tolerance = 1e-6 if isinstance(method, mlo.Neumann) else 1e-8
    assert zoo.relative_error(joined(engine.hypergradient("x")), exact) < tolerance


def test_stop_gradient_below_a_nested_stage():
    levels, _ = quadratic_levels(mlo.ConjugateGradient())
    levels[0].hypergradient = mlo.StopGradient()
    engine = mlo.Engine(levels)
    # z is a constant for everybody: y's Hessian is D + EᵀE, and only y's own response carries a gradient.
    x, y, z = (joined(dict(levels[i].module.named_parameters())).detach().requires_grad_() for i in (2, 1, 0))
    y_loss = levels[1].function(y, {"z": z.detach(), "x": x})
    g = torch.autograd.grad(y_loss, y, create_graph=True)[0]
    hessian = torch.stack([torch.autograd.grad(gi, y, retain_graph=True)[0] for gi in g])
    direct, cotangent = torch.autograd.grad(levels[2].function(x, {"z": z.detach(), "y": y}), (x, y))
    (mixed,) = torch.autograd.grad(g, x, torch.linalg.solve(hessian, cotangent))
    assert zoo.relative_error(joined(engine.hypergradient("x")), direct - mixed) < 1e-10


def test_finite_differences_are_refused_in_nested_graphs():
    levels, _ = quadratic_levels(mlo.ConjugateGradient())
    levels[1].hypergradient = mlo.FiniteDifference()
    with pytest.raises(mlo.GraphError, match=r"'y'.*FiniteDifference.*reads the response of 'z'"):
        mlo.Engine(levels)
    levels, _ = quadratic_levels(mlo.ConjugateGradient())
    levels[0].hypergradient = mlo.FiniteDifference()
    with pytest.raises(mlo.GraphError, match=r"'z'.*FiniteDifference.*inside the loss of 'y'"):
        mlo.Engine(levels)
    # Nothing differentiates the middle level twice here: the same method is right.
    levels[1].hypergradient = mlo.StopGradient()
    mlo.Engine(levels)


def test_finite_differences_refuse_a_second_derivative_in_the_functional_form():
    x = torch.tensor(1.0, requires_grad=True)
    w = mlo.best_response(lambda w, x: (w - x) ** 2 + w**4, torch.tensor(0.5), x, mlo.FiniteDifference(scale=0.5))
    (first,) = torch.autograd.grad(w**2, x, create_graph=True)
    with pytest.raises(mlo.ConfigurationError, match="differentiated again"):
        torch.autograd.grad(first, x)


@pytest.mark.parametrize("method", [mlo.ConjugateGradient(), mlo.Dense(), mlo.Neumann(terms=300, scale=0.2)])
def test_responses_can_be_differentiated_three_times(method):
    """θ*(x) of θ³/3·… has known derivatives: L = cosh θ − θ sinh x has θ* = asinh(sinh x) = x."""
    x = torch.tensor(0.7, requires_grad=True)
    w = mlo.best_response(lambda w, x: torch.cosh(w) - w * torch.sinh(x), x.detach().clone(), x, method)
    y = w**3
    derivatives = []
    for _ in range(3):
        (y,) = torch.autograd.grad(y, x, create_graph=True)
        derivatives.append(y.item())
    assert derivatives == pytest.approx([3 * 0.7**2, 6 * 0.7, 6.0], rel=1e-8)


class Field(torch.autograd.Function):
    """A "loss" whose gradient is Aw + sin w − x: what a game or a stop-gradient makes, symmetric only if A is."""

    @staticmethod
    def forward(ctx, w, x, a):
        ctx.save_for_backward(w, x, a)
        return w.sum() * 0

    @staticmethod
    def backward(ctx, c):
        w, x, a = ctx.saved_tensors
        return c * (a @ w + torch.sin(w) - x), None, None


@pytest.mark.parametrize("method", [mlo.Dense(), mlo.Neumann(terms=400, scale=0.3)])
def test_non_symmetric_stages_use_the_transposed_operator_in_second_derivatives(method):
    a = torch.tensor([[2.0, 0.6, 0.0], [-0.3, 1.5, 0.4], [0.5, -0.2, 1.8]])

    def solution(x):
        w = torch.zeros(3)
        for _ in range(50):
            w = w - torch.linalg.solve(a + torch.diag(torch.cos(w)), a @ w + torch.sin(w) - x)
        return w

    def gradient(x):  # of Σ w³ by the implicit function theorem
        w = solution(x)
        return torch.linalg.solve((a + torch.diag(torch.cos(w))).T, 3 * w**2)

    x = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    w = mlo.best_response(lambda w, x: Field.apply(w, x, a), solution(x.detach()), x, method)
    (first,) = torch.autograd.grad((w**3).sum(), x, create_graph=True)
    direction = torch.tensor([1.0, -2.0, 0.5])
    (second,) = torch.autograd.grad(first @ direction, x)

    e = 1e-5 * direction
    expected = (gradient(x.detach() + e) - gradient(x.detach() - e)) / 2e-5
    assert zoo.relative_error(first.detach(), gradient(x.detach())) < 1e-8
    assert zoo.relative_error(second, expected) < 1e-8


@pytest.mark.parametrize("symmetric", [True, False])
def test_methods_that_take_the_hessian_for_symmetric_are_never_given_the_transposed_operator(symmetric):
    seen = []

    class Columns(mlo.ImplicitMethod):
        assumes_symmetric = symmetric

        def solve(self, system):
            seen.append(torch.stack([system.product((e,))[0] for e in torch.eye(2)], dim=1))
            solved = torch.linalg.solve(seen[-1], system.rhs[0])
            return mlo.Solution((solved,), mlo.Status.CONVERGED, 2, 0.0)

    a, w = torch.tensor([[2.0, 0.6], [-0.3, 1.5]]), torch.tensor([0.4, -0.7])
    x = torch.ones(2, requires_grad=True)
    response = mlo.best_response(lambda w, x: Field.apply(w, x, a), w, x, Columns())
    (first,) = torch.autograd.grad(response.sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x)
    jacobian = a + torch.diag(torch.cos(w))
    # The first derivative, the derivative of its solve, and the response again, through the w that both depend on.
    expected = [jacobian.T, jacobian.T if symmetric else jacobian, jacobian.T]
    torch.testing.assert_close(seen, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_second_derivatives_of_any_size(size):
    """w* = x, and the squares of these cotangents are out of the range of float32."""
    at = torch.tensor(0.7, dtype=torch.float32)
    x = at.clone().requires_grad_()
    loss = lambda w, x: torch.cosh(w) - w * torch.sinh(x)
    response = mlo.best_response(loss, at, x, mlo.ConjugateGradient(on_breakdown="raise"))
    (first,) = torch.autograd.grad(size * response**2, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert first.item() / size == pytest.approx(1.4, rel=1e-5)
    assert second.item() / size == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("method", [mlo.ConjugateGradient(warm_start=True), mlo.SOBA(steps=60, scale=0.5)])
def test_solves_of_higher_derivatives_leave_the_warm_start_alone(method):
    """What is kept is λ = c / cosh w of the first derivative."""
    at, kept = torch.tensor([0.3, -0.8, 0.5]), {}
    x = at.clone().requires_grad_()
    loss = lambda w, x: (torch.cosh(w) - w * torch.sinh(x)).sum()
    response = mlo.best_response(loss, at, x, method, warm_starts=kept)
    (first,) = torch.autograd.grad((response**2).sum(), x, create_graph=True)
    adjoint = 2 * at / torch.cosh(at)
    for _ in range(2):
        ((found,),) = kept.values()
        assert zoo.relative_error(found, adjoint) < 1e-9
        (second,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
        assert zoo.relative_error(second, torch.full((3,), 2.0)) < 1e-9
