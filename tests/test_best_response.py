"""The functional form: structures, closed forms, `gradcheck`, re-solving, random draws, errors."""

from __future__ import annotations

import random
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import mlo
from tests import zoo


def leaves(tree):
    """The tensors of a structure, depth first; written out here, so that the library's own order is checked."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for part in (tree.values() if isinstance(tree, dict) else tree) for t in leaves(part)]


def flat(tree):
    return torch.cat([t.reshape(-1) for t in leaves(tree)])


def assign(tree, vector):
    with torch.no_grad():
        for t, part in zip(leaves(tree), vector.split([t.numel() for t in leaves(tree)]), strict=True):
            t.copy_(part.reshape(t.shape))


def shape_of(tree):
    """A structure with its tensors replaced by their shapes: containers are compared by type, keys in order."""
    if isinstance(tree, torch.Tensor):
        return tuple(tree.shape)
    if isinstance(tree, dict):
        return type(tree), [(key, shape_of(part)) for key, part in tree.items()]
    return type(tree), [shape_of(part) for part in tree]


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def wanted(*size):
    return torch.randn(size, requires_grad=True)


class Quadratic:
    """½ θᵀ H θ − θᵀ B x over all entries of both structures, so that θ* = H⁻¹ B x."""

    def __init__(self, solution, dependencies, hessian=None):
        n, k = flat(solution).numel(), flat(dependencies).numel()
        self.h = zoo.spd(n) if hessian is None else hessian
        self.b = torch.randn(n, k)
        assign(solution, torch.linalg.solve(self.h, self.b @ flat(dependencies).detach()))

    def __call__(self, theta, x):
        v = flat(theta)
        return 0.5 * v @ self.h @ v - v @ self.b @ flat(x)


def gradients(output, dependencies):
    """The gradient in one vector, with zeros where there is none."""
    found = torch.autograd.grad(output, [t for t in leaves(dependencies) if t.requires_grad], allow_unused=True)
    given = iter(found)
    parts = [next(given) if t.requires_grad else None for t in leaves(dependencies)]
    return flat([torch.zeros_like(t) if g is None else g for t, g in zip(leaves(dependencies), parts, strict=True)])


# --- structures ------------------------------------------------------------------------------------------------

STRUCTURES = {
    "tensor": lambda: wanted(3, 2),
    "number": lambda: wanted(),
    "one entry": lambda: wanted(1, 1, 1),
    "list": lambda: [wanted(2), wanted(), wanted(2, 2)],
    "tuple": lambda: (wanted(2, 1), wanted(3)),
    "dict": lambda: {"z": wanted(), "a": wanted(2, 2)},  # not in alphabetical order
    "named tuple": lambda: Pair(wanted(2), wanted()),
    "nested": lambda: {"b": [wanted(2), (wanted(), {"deep": wanted(1, 3)})], "a": (wanted(2),)},
    "empty members": lambda: {"none": [], "some": [wanted(2), (), {}], "no entries": wanted(0, 3)},
}


@pytest.mark.parametrize("of_dependencies", STRUCTURES)
@pytest.mark.parametrize("of_solution", STRUCTURES)
def test_structures(of_solution, of_dependencies):
    solution, x = STRUCTURES[of_solution](), STRUCTURES[of_dependencies]()
    loss = Quadratic(solution, x)
    before = flat(solution).detach().clone()
    result = mlo.best_response(loss, solution, x, mlo.ConjugateGradient(rtol=1e-13))

    assert shape_of(result) == shape_of(solution)
    for given, t in zip(leaves(solution), leaves(result), strict=True):
        assert t.data_ptr() == given.data_ptr()
        assert t.requires_grad
    assert torch.equal(flat(result), before)

    c = torch.randn_like(before)
    expected = loss.b.T @ torch.linalg.solve(loss.h, c)
    assert zoo.relative_error(gradients(c @ flat(result), x), expected) < 1e-11


@pytest.mark.parametrize(
    ("method", "inverse", "tolerance"),
    [
        (mlo.ConjugateGradient(rtol=1e-13), torch.linalg.inv, 1e-11),
        (mlo.Dense(), torch.linalg.inv, 1e-12),
        (mlo.FiniteDifference(scale=0.3), lambda h: 0.3 * torch.eye(len(h)), 1e-7),
    ],
)
def test_dependencies_that_carry_no_gradient(method, inverse, tolerance):
    """Constants, indices and a mask stand among the dependencies and reach the loss as they are."""
    mask = torch.tensor([True, False, True, True])
    x = {"value": wanted(4), "rest": [torch.tensor([2, 0, 3, 1]), torch.randn(4), {"mask": mask}]}
    h = zoo.spd(4)

    def right_side(given):
        order, fixed, more = given["rest"]
        return torch.where(more["mask"], 2 * given["value"][order], fixed)

    def loss(theta, given):
        assert [t.dtype for t in leaves(given)] == [torch.float64, torch.int64, torch.float64, torch.bool]
        return 0.5 * theta @ h @ theta - theta @ right_side(given)

    c = torch.randn(4)
    result = mlo.best_response(loss, torch.linalg.solve(h, right_side(x).detach()), x, method)
    expected = torch.zeros(4)
    expected[x["rest"][0]] = 2 * mask * (inverse(h) @ c)
    (found,) = torch.autograd.grad(c @ result, x["value"])
    assert zoo.relative_error(found, expected) < tolerance


@pytest.mark.parametrize("method", [mlo.ConjugateGradient(), mlo.Dense()])
def test_indices_among_the_dependencies_in_second_derivatives(method):
    # θ* = x[order]²: F = Σ θ*² has ∂F/∂x = 4x³ and the diagonal second derivative 12x².
    x, order = wanted(3), torch.tensor([2, 0, 1])

    def loss(theta, given):
        return torch.cosh(theta - given[0][given[1]] ** 2).sum()

    result = mlo.best_response(loss, x.detach()[order] ** 2, (x, order), method)
    (first,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert zoo.relative_error(first.detach(), 4 * x.detach() ** 3) < 1e-10
    assert zoo.relative_error(second, 12 * x.detach() ** 2) < 1e-10


def test_a_transposed_solution_keeps_its_strides():
    storage, x = torch.zeros(2, 3), wanted(4)
    loss = Quadratic(storage.T, x)
    result = mlo.best_response(loss, storage.T, x, mlo.ConjugateGradient(rtol=1e-13))
    assert (result.stride(), result.data_ptr()) == ((1, 3), storage.data_ptr())
    c = torch.randn(6)
    expected = loss.b.T @ torch.linalg.solve(loss.h, c)
    assert zoo.relative_error(gradients(c @ flat(result), x), expected) < 1e-11


@pytest.mark.parametrize("method", [mlo.ConjugateGradient(), mlo.Dense(), mlo.Neumann(terms=500, scale=0.2)])
def test_two_precisions_in_one_solution(method):
    solution, x = [torch.zeros(3), torch.zeros(2, dtype=torch.float32)], wanted(4)
    loss = Quadratic(solution, x)
    result = mlo.best_response(loss, solution, x, method)
    assert [t.dtype for t in result] == [torch.float64, torch.float32]
    c = torch.randn(5)
    expected = loss.b.T @ torch.linalg.solve(loss.h, c)
    assert zoo.relative_error(gradients(c @ flat(result), x), expected) < 1e-5


def test_only_dependencies_are_differentiated():
    """A solution made of parameters, or with a history of its own, gets no gradient; nor does what is captured."""
    x, parameter, captured = wanted(3), torch.nn.Parameter(torch.zeros(3)), wanted(3)
    loss = Quadratic(parameter, x)

    def with_captured(theta, given):
        return loss(theta, given) + theta @ captured - theta @ captured.detach()

    result = mlo.best_response(with_captured, parameter, x, mlo.Dense())
    (result @ torch.ones(3)).backward()
    assert parameter.grad is None
    assert captured.grad is None
    expected = loss.b.T @ torch.linalg.solve(loss.h, torch.ones(3))
    assert zoo.relative_error(x.grad, expected) < 1e-11

    result = mlo.best_response(loss, 2 * parameter / 2, x, mlo.Dense())
    assert torch.autograd.grad(result.sum(), (parameter, x), allow_unused=True)[0] is None


def test_what_a_captured_tensor_takes_from_a_dependency_is_constant():
    # θ* = x·y with y = x² captured: the response is x ↦ x·(x² as a number), whose slope is x² and not 3x².
    x = torch.tensor(1.5, requires_grad=True)
    y = x**2
    given = (x * y).detach()
    result = mlo.best_response(lambda w, x: (w - x * y) ** 2, given, x, mlo.ConjugateGradient())
    assert torch.autograd.grad(result, x, retain_graph=True)[0].item() == pytest.approx(1.5**2, rel=1e-12)
    # Passed as a dependency it counts.
    result = mlo.best_response(lambda w, d: (w - d[0] * d[1]) ** 2, given, (x, y), mlo.ConjugateGradient())
    assert torch.autograd.grad(result, x)[0].item() == pytest.approx(3 * 1.5**2, rel=1e-12)


@pytest.mark.parametrize("how", ["no dependency needs a gradient", "gradients are off", "the method carries none"])
def test_constant_results(how):
    solution, x = [wanted(2), wanted()], wanted(3)
    loss = Quadratic(solution, x)
    if how == "gradients are off":
        with torch.no_grad():
            result = mlo.best_response(loss, solution, x, mlo.Dense())
    elif how == "the method carries none":
        result = mlo.best_response(loss, solution, x, mlo.StopGradient())
    else:
        result = mlo.best_response(loss, solution, x.detach(), mlo.Dense())
    assert not any(t.requires_grad for t in result)
    assert [t.data_ptr() for t in result] == [t.data_ptr() for t in solution]


WRITES = {
    "add": lambda t: t.add_(1),
    "copy": lambda t: t.copy_(torch.ones_like(t)),
    "item": lambda t: t.__setitem__(..., 1.0),
    "view": lambda t: t.view(-1).mul_(2),
    "out": lambda t: torch.exp(t.detach(), out=t),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("place", ["m", "s"])
def test_writing_to_a_response_in_place_is_an_error(write, place):
    solution, x = {"m": torch.zeros(2, 2), "s": torch.zeros(())}, wanted(3)
    loss = Quadratic(solution, x)
    before = flat(solution)
    result = mlo.best_response(loss, solution, x, mlo.ConjugateGradient())
    with pytest.raises(RuntimeError, match=r"(?i)in-?place|out=\.\.\. arguments don't support automatic"):
        WRITES[write](result[place])
    assert torch.equal(flat(solution), before)


@pytest.mark.parametrize("head", [torch.sum, torch.norm])  # the second one keeps its argument, the first does not
def test_writing_to_the_solution_before_the_backward_pass_is_an_error(head):
    solution, x = torch.zeros(3), wanted(3)
    loss = Quadratic(solution, x)
    value = head(mlo.best_response(loss, solution, x, mlo.ConjugateGradient()))
    solution.add_(1)
    with pytest.raises(RuntimeError, match=r"modified in-?place|modified by an inplace"):
        value.backward()


# --- closed forms ----------------------------------------------------------------------------------------------


def neumann(terms, scale):
    def inverse(h):
        step = torch.eye(len(h)) - scale * h
        return scale * sum(torch.linalg.matrix_power(step, k) for k in range(terms))

    return inverse


def multiple(scale):
    return lambda h: scale * torch.eye(len(h))


# What a method puts in the place of H⁻¹, and how close it has to come.
METHODS = [
    (mlo.ConjugateGradient(rtol=1e-13), torch.linalg.inv, 1e-11),
    (mlo.ConjugateGradient(damping=0.5), lambda h: torch.linalg.inv(h + 0.5 * torch.eye(len(h))), 1e-9),
    (mlo.Dense(), torch.linalg.inv, 1e-12),
    (mlo.Neumann(terms=2000, scale=0.2), torch.linalg.inv, 1e-8),
    (mlo.Neumann(terms=5, scale=0.2), neumann(5, 0.2), 1e-12),
    (mlo.Identity(), multiple(1.0), 1e-12),
    (mlo.Identity(scale=0.3), multiple(0.3), 1e-12),
    # Differences of a quadratic have no truncation error, only rounding.
    (mlo.FiniteDifference(scale=0.3), multiple(0.3), 1e-8),
    (mlo.FiniteDifference(scale=2.0, epsilon=0.1), multiple(2.0), 1e-10),
    (mlo.StopGradient(), multiple(0.0), 1e-15),
]


@pytest.mark.parametrize(("method", "inverse", "tolerance"), METHODS)
def test_a_coupled_quadratic_over_several_tensors(method, inverse, tolerance):
    solution, x = STRUCTURES["nested"](), STRUCTURES["nested"]()
    loss = Quadratic(solution, x)
    assert torch.linalg.eigvalsh(loss.h)[-1] < 2 / 0.2  # so that the series converges
    v, d, target = flat(solution).detach(), torch.randn(len(flat(x))), torch.randn(len(flat(solution)))

    result = flat(mlo.best_response(loss, solution, x, method))
    value = 0.5 * (result - target).square().sum() + torch.sin(d @ flat(x))
    direct = torch.cos(d @ flat(x)).detach() * d
    expected = direct + loss.b.T @ inverse(loss.h) @ (v - target)
    assert zoo.relative_error(gradients(value, x), expected) < tolerance


@pytest.mark.parametrize(("method", "inverse", "tolerance"), METHODS[:-1])
def test_a_cotangent_for_one_of_several_tensors(method, inverse, tolerance):
    solution, x = [torch.zeros(2, 2), torch.zeros(()), torch.zeros(3)], wanted(5)
    loss = Quadratic(solution, x)
    result = mlo.best_response(loss, solution, x, method)
    unit = torch.zeros(8)
    unit[4] = 1  # the tensor without dimensions
    expected = loss.b.T @ inverse(loss.h) @ unit
    assert zoo.relative_error(gradients(result[1], x), expected) < tolerance


@pytest.mark.parametrize("epsilon", [1e-3, 0.25])
def test_finite_differences_follow_their_own_formula(epsilon):
    # L = x²·sin θ: the difference of ∂L/∂x = 2x·sin θ over ±ε along c/‖c‖ is exact in closed form.
    x, theta, c, scale = torch.tensor(0.8, requires_grad=True), torch.tensor(0.4), -3.0, 0.7
    result = mlo.best_response(
        lambda w, x: x**2 * torch.sin(w), theta, x, mlo.FiniteDifference(scale=scale, epsilon=epsilon)
    )
    (found,) = torch.autograd.grad(c * result, x)
    # sin(θ + e) − sin(θ − e) = 2·cos θ·sin e, here e = −ε for the direction of c.
    expected = -scale * c * 2 * 0.8 * torch.cos(theta).item() * np.sin(epsilon) / epsilon
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_a_response_that_is_used_several_times_is_solved_once():
    # Every gradient in θ passes the hook: one for the loss and one for each Hessian product.
    solution, x = torch.zeros(6), wanted(4)
    loss, passes = Quadratic(solution, x, hessian=three_eigenvalues(6)), []

    def counted(theta, given):
        theta.register_hook(lambda g: passes.append(1))
        return loss(theta, given)

    result = mlo.best_response(counted, solution, x, mlo.ConjugateGradient(rtol=1e-10))
    assert not passes  # nothing is evaluated in the forward pass
    value = sum((k * result).sin().sum() for k in range(1, 4))
    cotangent = sum(k * torch.cos(k * solution) for k in range(1, 4))
    expected = loss.b.T @ torch.linalg.solve(loss.h, cotangent)
    assert zoo.relative_error(gradients(value, x), expected) < 1e-9
    assert len(passes) == 1 + 3


# --- derivatives of first and second order, on stages that are solved anew for every x --------------------------


def newton_step(function, v, given, create_graph):
    (g,) = torch.autograd.grad(function(v, *given), v, create_graph=True)
    rows = [torch.autograd.grad(gi, v, create_graph=create_graph, retain_graph=True)[0] for gi in g]
    return v - torch.linalg.solve(torch.stack(rows), g), g.norm().item()


def argmin(function, n, *given, derivative_steps=0):
    """The vector v that minimises function(v, *given).

    Each further step of Newton's method that autograd sees doubles the order to which its derivatives in `given` are
    right: one gives the first, two the third.
    """
    fixed = [t.detach() for t in given]
    v = torch.zeros(n)
    for _ in range(60):
        v, slope = newton_step(function, v.detach().requires_grad_(), fixed, False)
        if slope < 1e-14:
            break
    v = v.detach()
    for _ in range(derivative_steps):
        v, _ = newton_step(function, v if v.requires_grad else v.requires_grad_(), given, True)
    return v


def slopes(function, x, epsilon=1e-3):
    """Central differences of fourth order."""

    def value(shift):
        return function(x.detach() + shift).detach()

    def slope(e):
        near, far = value(e) - value(-e), value(2 * e) - value(-2 * e)
        return (8 * near - far) / (12 * epsilon)

    return torch.stack([slope(epsilon * e) for e in torch.eye(len(x))])


class Convex:
    """A strongly convex, non-quadratic function of v, in which everything else enters its curvature too."""

    def __init__(self, n, *sizes):
        self.s, self.couplings = zoo.spd(n, shift=1.5), [0.5 * torch.randn(n, k) for k in sizes]

    def __call__(self, v, *given):
        loss = 0.5 * v @ self.s @ v + torch.cosh(0.5 * v).sum()
        for b, t in zip(self.couplings, given, strict=True):
            loss = loss - v @ b @ torch.sin(t) + (1 + t.square().sum()) * (v**4).sum() / 24
        return loss


EXACT = [mlo.ConjugateGradient(rtol=1e-14), mlo.Dense()]


class OneStage:
    """Its solution is split into a matrix and a number, its dependencies are a vector and a number."""

    def __init__(self, method):
        self.method, self.stage = method, Convex(3, 2, 1)

    def loss(self, theta, given):
        return self.stage(flat(theta), given[0], given[1].reshape(1))

    def __call__(self, x, y):
        v = argmin(self.stage, 3, x.detach(), y.detach().reshape(1))
        theta = {"m": v[:2].reshape(2, 1), "s": v[2].clone()}
        result = mlo.best_response(self.loss, theta, (x, y), self.method)
        # Each output gets cotangents of its own; the last one is the solution itself.
        return torch.sin(result["m"]) * x, result["s"] ** 2 * y + (result["m"].T @ result["m"]).sum(), result["s"]

    inputs = (2,), ()


class TwoStages:
    """v1*(x), v2*(v1*, x): a chain."""

    def __init__(self, method):
        self.methods = method if isinstance(method, tuple) else (method, method)
        self.first, self.second = Convex(2, 2), Convex(3, 2, 2)

    def head(self, v1, v2, x):
        return torch.sin(v2).sum() + v2 @ v2 * x[0] + 0.3 * v1 @ x

    def __call__(self, x):
        v1 = argmin(self.first, 2, x.detach())
        v2 = argmin(self.second, 3, v1, x.detach())
        r1 = mlo.best_response(self.first, v1, x, self.methods[0])
        r2 = mlo.best_response(lambda v, d: self.second(v, *d), v2, (r1, x), self.methods[1])
        return self.head(r1, r2, x)

    def solved(self, x):
        v1 = argmin(self.first, 2, x)
        return self.head(v1, argmin(self.second, 3, v1, x), x)

    inputs = ((2,),)


class Nested:
    """low*(mid, x) stands inside the loss of mid, whose solution is therefore that of the reduced loss."""

    def __init__(self, method, rebuilt=True):
        self.methods = method if isinstance(method, tuple) else (method, method)
        self.rebuilt = rebuilt
        self.low, self.mid = Convex(2, 2, 2), Convex(2, 2, 2)

    def reduced(self, mid, x):
        return self.mid(mid, argmin(self.low, 2, mid, x, derivative_steps=2), x)

    def head(self, low, mid, x):
        return torch.sin(low).sum() + (low @ mid) * x[1] + 0.3 * mid @ x

    def __call__(self, x):
        mid = argmin(self.reduced, 2, x.detach())
        low = argmin(self.low, 2, mid, x.detach())

        def lower(v, d):
            return self.low(v, *d)

        def middle(v, x):
            inner = mlo.best_response(lower, low, (v, x), self.methods[0]) if self.rebuilt else low
            return self.mid(v, inner, x)

        m = mlo.best_response(middle, mid, x, self.methods[1])
        return self.head(mlo.best_response(lower, low, (m, x), self.methods[0]), m, x)

    def solved(self, x):
        mid = argmin(self.reduced, 2, x)
        return self.head(argmin(self.low, 2, mid, x), mid, x)

    inputs = ((2,),)


@pytest.mark.parametrize("kind", [OneStage, TwoStages, Nested])
@pytest.mark.parametrize("method", EXACT)
class TestDerivativesBySolvingAnew:
    def test_first(self, kind, method):
        assert gradcheck(kind(method), [wanted(*size) for size in kind.inputs], atol=1e-8, rtol=1e-7)

    def test_second(self, kind, method):
        assert gradgradcheck(kind(method), [wanted(*size) for size in kind.inputs], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", [TwoStages, Nested])
@pytest.mark.parametrize("method", [*EXACT, mlo.Neumann(terms=400, scale=0.2), (EXACT[0], EXACT[1])])
def test_chains_and_nested_stages_equal_resolving(kind, method):
    value, x = kind(method), wanted(2)
    (found,) = torch.autograd.grad(value(x), x)
    assert zoo.relative_error(found, slopes(value.solved, x)) < 1e-8


def test_a_response_that_is_captured_instead_of_rebuilt_would_be_wrong():
    """A value from outside is a constant, so that the test above can fail."""
    value, x = Nested(mlo.Dense(), rebuilt=False), wanted(2)
    (found,) = torch.autograd.grad(value(x), x)
    assert zoo.relative_error(found, slopes(value.solved, x)) > 1e-3


def test_finite_differences_end_a_chain_and_conjugate_gradients_begin_it():
    # Two quadratics: θ1 = H1⁻¹ B1 x exactly, and the inverse of H2 replaced by 0.4·I.
    x, first, second = wanted(4), torch.zeros(3), torch.zeros(2, 1)
    one = Quadratic(first, x)
    two = Quadratic(second, (first, x))
    r1 = mlo.best_response(one, first, x, mlo.ConjugateGradient(rtol=1e-13))
    r2 = mlo.best_response(two, second, (r1, x), mlo.FiniteDifference(scale=0.4))
    c = torch.randn(2)
    to_first, to_x = (0.4 * two.b.T @ c).split([3, 4])
    expected = to_x + one.b.T @ torch.linalg.solve(one.h, to_first)
    assert zoo.relative_error(gradients(c @ flat(r2), x), expected) < 1e-8


# --- warm starts -----------------------------------------------------------------------------------------------


def three_eigenvalues(n):
    """A matrix with the eigenvalues 1, 3 and 7: conjugate gradients take three steps."""
    q = torch.linalg.qr(torch.randn(n, n)).Q
    return q @ torch.diag(torch.tensor([1.0, 3.0, 7.0]).repeat(n)[:n]) @ q.T


class Recorded(mlo.ConjugateGradient):
    """Keeps the iterations of its solves, which the functional form reports to nobody."""

    iterations: ClassVar[list[int]] = []

    def solve(self, system):
        solution = super().solve(system)
        self.iterations.append(solution.iterations)
        return solution


@pytest.fixture
def iterations():
    Recorded.iterations.clear()
    return Recorded.iterations


def test_warm_starts_begin_from_the_solution_before(iterations):
    solution, x, kept = [torch.zeros(4), torch.zeros(2, 1)], wanted(5), {}
    loss = Quadratic(solution, x, hessian=three_eigenvalues(6))
    passes = []

    def counted(theta, given):
        theta[0].register_hook(lambda g: passes.append(1))
        return loss(theta, given)

    def gradient(c):
        passes.clear()
        result = mlo.best_response(counted, solution, x, Recorded(warm_start=True, rtol=1e-10), warm_starts=kept)
        found = gradients(c @ flat(result), x)
        assert zoo.relative_error(found, loss.b.T @ torch.linalg.solve(loss.h, c)) < 1e-9
        return len(passes)

    c = torch.randn(6)
    assert gradient(c) == 1 + 3
    # What is kept is λ = H⁻¹ c in the shapes of the solution.
    (adjoint,) = kept.values()
    assert [t.shape for t in adjoint] == [t.shape for t in solution]
    assert zoo.relative_error(flat(list(adjoint)), torch.linalg.solve(loss.h, c)) < 1e-9

    assert gradient(c) == 1 + 1  # one product finds that nothing is left to do
    # A change along one eigenvector leaves a residual that one step removes.
    _, vectors = torch.linalg.eigh(loss.h)
    assert gradient(c + 0.1 * vectors[:, 0]) == 1 + 1 + 1
    assert iterations == [3, 0, 1]
    # A start that is worse than none is not used: from zero one step leads to the solution for an eigenvector.
    assert gradient(0.01 * vectors[:, -1]) == 1 + 1 + 1


def test_without_warm_start_nothing_is_kept(iterations):
    solution, x, kept = torch.zeros(6), wanted(5), {}
    loss = Quadratic(solution, x, hessian=three_eigenvalues(6))
    for _ in range(2):
        result = mlo.best_response(loss, solution, x, Recorded(), warm_starts=kept)
        result.sum().backward()
    assert iterations == [3, 3]
    assert not kept


def test_a_kept_solution_of_another_shape_is_not_used(iterations):
    kept, method = {}, Recorded(warm_start=True, rtol=1e-10)
    for n in (6, 5):
        solution, x = torch.zeros(n), wanted(3)
        loss = Quadratic(solution, x, hessian=three_eigenvalues(n))
        c = torch.randn(n)
        found = gradients(c @ mlo.best_response(loss, solution, x, method, warm_starts=kept), x)
        assert zoo.relative_error(found, loss.b.T @ torch.linalg.solve(loss.h, c)) < 1e-9
    assert iterations == [3, 3]


# --- random draws ----------------------------------------------------------------------------------------------


class Dropped:
    """½ Σ mᵢ(θᵢ − xᵢ)² + ¼ Σ θᵢ² with a mask m that each evaluation draws: H = diag(m + ½), θ* = m·x / (m + ½)."""

    def __init__(self, draw):
        self.draw, self.masks = draw, []

    def __call__(self, theta, x):
        mask = self.draw(theta.shape)
        self.masks.append(mask)
        return 0.5 * (mask * (theta - x) ** 2).sum() + 0.25 * (theta**2).sum()


N = 40
DRAWS = {
    "dropout": lambda shape: F.dropout(torch.ones(shape), 0.5),
    "torch": lambda shape: torch.rand(shape),
    "numpy": lambda shape: torch.from_numpy(np.random.rand(*shape)),
    "python": lambda shape: torch.tensor([random.random() for _ in range(shape[0])]),
}


def seed():
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


def generators():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]


def same(before, after):
    return torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(
    ("method", "inverse", "tolerance"),
    [
        (mlo.ConjugateGradient(rtol=1e-13), lambda mask: 1 / (mask + 0.5), 1e-11),
        (mlo.Dense(), lambda mask: 1 / (mask + 0.5), 1e-11),
        (mlo.FiniteDifference(scale=0.4), lambda mask: 0.4, 1e-7),
        (mlo.Identity(scale=0.4), lambda mask: 0.4, 1e-12),
    ],
)
def test_every_evaluation_draws_what_the_call_would_have_drawn(method, inverse, tolerance, draw):
    loss, x = Dropped(DRAWS[draw]), wanted(N)
    seed()
    mask = DRAWS[draw]((N,))  # what the generators give at the time of the call
    solution = mask * x.detach() / (mask + 0.5)
    seed()
    result = mlo.best_response(loss, solution, x, method)
    assert not loss.masks

    DRAWS[draw]((7,))  # the backward pass comes at another state, and leaves it alone
    before = generators()
    (found,) = torch.autograd.grad(0.5 * result.square().sum(), x, create_graph=method.differentiable)
    slope = mask * inverse(mask)  # dθ*/dx as the method has it
    assert zoo.relative_error(found.detach(), slope * solution) < tolerance
    if method.differentiable:
        (again,) = torch.autograd.grad(found.sum(), x)
        assert zoo.relative_error(again, slope**2) < tolerance

    assert same(before, generators())
    assert len(loss.masks) >= 2
    assert all(torch.equal(m, mask) for m in loss.masks)


# --- errors ----------------------------------------------------------------------------------------------------


def must_not_run(theta, x):
    raise AssertionError("arguments are checked before the loss is evaluated")


ONES = torch.ones(2, dtype=torch.float64)
WRONG = {
    "loss is a tensor": (ONES.sum(), ONES, ONES, mlo.Dense()),
    "method is a class": (must_not_run, ONES, ONES, mlo.Dense),
    "no method": (must_not_run, ONES, ONES, None),
    "number in solution": (must_not_run, {"a": [ONES, (1.5,)]}, ONES, mlo.Dense()),
    "array in dependencies": (must_not_run, ONES, {"a": np.ones(2)}, mlo.Dense()),
    "None in dependencies": (must_not_run, ONES, [ONES, None], mlo.Dense()),
    "set of tensors": (must_not_run, {ONES}, ONES, mlo.Dense()),
    "no tensor in solution": (must_not_run, {"a": [], "b": ()}, ONES, mlo.Dense()),
    "no tensor in dependencies": (must_not_run, ONES, (), mlo.Dense()),
    "integers in solution": (must_not_run, [ONES, torch.ones(2, dtype=torch.long)], ONES, mlo.Dense()),
    "truth values in solution": (must_not_run, [ONES > 0], ONES, mlo.Dense()),
    "complex solution": (must_not_run, ONES + 1j, ONES, mlo.Dense()),
    "no learning rate": (must_not_run, ONES, ONES, mlo.Identity(scale=None)),
    "no place for a warm start": (must_not_run, ONES, ONES, mlo.ConjugateGradient(warm_start=True)),
}
MESSAGES = {
    "loss is a tensor": r"loss=tensor\(2\..*\)\): expected a function of the solution and the dependencies",
    "method is a class": r"method=<class .*Dense'>\): expected a hypergradient method such as",
    "no method": r"method=None\): expected a hypergradient method such as mlo.ConjugateGradient\(\)",
    "number in solution": r"solution=…\): expected a tensor or a nested tuple, list or dict of tensors, got 1.5",
    "array in dependencies": r"dependencies=…\): expected .* dict of tensors, got array\(\[1., 1.\]\)",
    "None in dependencies": r"dependencies=…\): expected .* dict of tensors, got None",
    "set of tensors": r"solution=…\): expected .* dict of tensors, got \{tensor",
    "no tensor in solution": r"solution=…\): expected .*, got nothing",
    "no tensor in dependencies": r"dependencies=…\): expected .*, got nothing",
    "integers in solution": r"solution=…\): expected real floating-point tensors",
    "truth values in solution": r"solution=…\): expected real floating-point tensors",
    "complex solution": r"solution=…\): expected real floating-point tensors",
    "no learning rate": r"Identity at stage 'best_response'.*no optimizer.*Identity\(scale=0.1\)",
    "no place for a warm start": r"warm_start=True.*outlives the call; pass warm_starts= with one dictionary",
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    with pytest.raises(mlo.ConfigurationError, match=MESSAGES[case]):
        mlo.best_response(*WRONG[case])


@pytest.mark.parametrize("method", [mlo.ConjugateGradient(), mlo.Identity(), mlo.FiniteDifference(scale=0.5)])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda w, x: (w - x) ** 2, r"given to best_response returned a tensor of shape \(2,\); expected a scalar"),
        (lambda w, x: ((w - x) ** 2).sum() * float("nan"), r"given to best_response returned nan; expected a finite"),
        (lambda w, x: ((w - x) ** 2).sum() / 0, r"returned (nan|inf); expected a finite number"),
        (lambda w, x: None, r"returned NoneType; expected a scalar tensor"),
        (lambda w, x: {"loss": (w - x).sum()}, r"returned dict; expected a scalar tensor"),
        (lambda w, x: (w - x).sum().long(), r"torch.int64; expected a real floating-point scalar"),
    ],
)
def test_losses_that_are_no_finite_scalars(loss, message, method):
    x = wanted(2)
    result = mlo.best_response(loss, torch.zeros(2), x, method)  # not evaluated yet
    with pytest.raises(mlo.LossError, match=message):
        result.sum().backward()
    assert x.grad is None


def test_a_loss_that_is_finite_at_the_solution_only():
    # √(θ − x) at θ = x + 10⁻⁴: the difference reaches behind the branch point, the exact methods do not.
    x = torch.tensor(1.0, requires_grad=True)

    def loss(w, x):
        return torch.sqrt(w - x)

    theta = torch.tensor(1.0001)
    result = mlo.best_response(loss, theta, x, mlo.FiniteDifference(scale=1.0, epsilon=1e-2))
    with pytest.raises(mlo.LossError, match="returned nan"):
        result.backward()
    result = mlo.best_response(loss, theta, x, mlo.Dense())
    assert torch.autograd.grad(result, x)[0].item() == pytest.approx(1.0)


def test_exceptions_of_the_loss_keep_their_type_and_leave_the_generators_alone():
    def loss(theta, x):
        torch.rand(3)
        raise KeyError("mine")

    result = mlo.best_response(loss, torch.zeros(2), wanted(2), mlo.ConjugateGradient())
    before = generators()
    with pytest.raises(KeyError, match="mine"):
        result.sum().backward()
    assert same(before, generators())
