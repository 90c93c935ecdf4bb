"""The solvers of a stage's linear system against dense linear algebra, SciPy and plain loops.

Through `best_response` and the engine, where the answer is what counts; on a matrix of their own, where steps, products
and statuses do.
"""

from __future__ import annotations

import collections
import gc
import math
import re
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import mlo
from mlo import Status
from mlo.hypergradient.gmres import GMRES
from mlo.hypergradient.minres import MINRES
from mlo.hypergradient.nystrom import Nystrom
from mlo.vectors import norm
from tests import zoo
from tests.test_hypergradient_nested import Field, joined, non_quadratic_levels, quadratic_levels

CG, Neumann, Dense = mlo.ConjugateGradient, mlo.Neumann, mlo.Dense
SHAPES = [(), (2, 1), (0,), (3,)]  # of six numbers: 0-dim, without any entry, and others


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def symmetric(eigenvalues):
    """A symmetric matrix with the given eigenvalues and random eigenvectors."""
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues))).Q
    a = q @ torch.diag(eigenvalues) @ q.T
    return (a + a.T) / 2


def spectrum(n, condition, *, indefinite=False):
    values = torch.logspace(0, -math.log10(condition), n)
    return values * (-1) ** torch.arange(n) if indefinite else values


# --- a system without a stage ------------------------------------------------------------------------------------


class System:
    """A matrix and a right-hand side, cut into tensors of the given shapes, as a solver sees them."""

    name, learning_rates = "matrix", None

    def __init__(self, matrix, rhs, shapes=None, last=None):
        self.matrix, self.flat = matrix, rhs
        self.shapes = [tuple(rhs.shape)] if shapes is None else shapes
        self.products, self.asked = 0, []
        self.rhs = self.cut(rhs)
        self.last_solution = None if last is None else self.cut(last)

    @property
    def rhs_norm(self):
        return norm(self.rhs)

    def cut(self, vector):
        sizes = [math.prod(s) for s in self.shapes]
        return tuple(p.reshape(s) for p, s in zip(vector.split(sizes), self.shapes, strict=True))

    def product(self, vector):
        assert [tuple(t.shape) for t in vector] == self.shapes
        self.products += 1
        self.asked.append(flat(vector))
        return self.cut(self.matrix @ self.asked[-1])


def flat(vector):
    return torch.cat([t.reshape(-1) for t in vector])


@dataclass
class Solved:
    vector: torch.Tensor
    status: Status
    iterations: int
    residual: float | None
    products: int
    system: System


def solved(method, matrix, rhs, **options):
    given = [t for t in (rhs, options.get("last")) if t is not None]
    before = [t.clone() for t in given]
    system = System(matrix, rhs, **options)
    solution = method.solve(system)
    assert all(torch.equal(t.nan_to_num(), b.nan_to_num()) for t, b in zip(given, before, strict=True))  # only read
    assert [tuple(t.shape) for t in solution.vector] == system.shapes
    assert all(t.dtype == rhs.dtype for t in solution.vector)
    return Solved(
        flat(solution.vector), solution.status, solution.iterations, solution.relative_residual, system.products, system
    )


def exact(matrix, rhs, damping=0.0):
    return torch.linalg.solve(matrix + damping * torch.eye(len(rhs)), rhs)


# --- through best_response -----------------------------------------------------------------------------------------


class FieldLoss(torch.autograd.Function):
    """A "loss" of w whose gradient is the given vector, a function of w: what a stop-gradient or a game makes."""

    @staticmethod
    def forward(ctx, w, vector):
        ctx.save_for_backward(vector)
        return w.sum() * 0

    @staticmethod
    def backward(ctx, c):
        return c * ctx.saved_tensors[0], None


def pulled_back(matrix, method, *, shapes=None, damping=0.0):
    """The hypergradient of c·θ*(x) at a stage with ∂L/∂θ = Hθ − Bx, and the closed form Bᵀ (H + damping·I)⁻ᵀ c.

    H = `matrix` need not be symmetric. For one tensor of parameters, or for several.
    """
    n = len(matrix)
    b, c, x = torch.randn(n, 4), torch.randn(n), torch.randn(4, requires_grad=True)
    theta = torch.linalg.solve(matrix, b @ x.detach())

    def loss(w, x):
        w = w if shapes is None else flat(w)
        return FieldLoss.apply(w, matrix @ w - b @ x)

    response = mlo.best_response(loss, theta if shapes is None else list(System(matrix, theta, shapes).rhs), x, method)
    found = torch.autograd.grad((response if shapes is None else flat(response)) @ c, x)[0]
    return found, b.T @ exact(matrix.T, c, damping)


SOLVERS = {
    "CG": CG(rtol=1e-12, max_steps=1000),
    "CG, preconditioned": CG(rtol=1e-12, max_steps=1000, preconditioner=Nystrom(rank=4, damping=0.1)),
    "GMRES": GMRES(rtol=1e-12),
    "GMRES, restarted": GMRES(rtol=1e-12, restart=4, max_steps=2000),
    "MINRES": MINRES(rtol=1e-12, max_steps=1000),
    "Neumann": Neumann(terms=None, scale="auto", rtol=1e-12),
    "Dense": Dense(),
}
SOLVERS = {name: replace(method, on_breakdown="raise") for name, method in SOLVERS.items()}
every_solver = pytest.mark.parametrize("name", SOLVERS)
KRYLOV = [CG, GMRES, MINRES]


@every_solver
@pytest.mark.parametrize("shapes", [None, SHAPES, [(6,)], [(1, 6)]])
def test_positive_definite_stages(name, shapes):
    found, expected = pulled_back(zoo.spd(6), SOLVERS[name], shapes=shapes)
    assert zoo.relative_error(found, expected) < 1e-10


@every_solver
def test_one_number(name):
    x = torch.tensor(2.0, requires_grad=True)
    response = mlo.best_response(lambda w, x: 2 * w**2 - w * x, torch.tensor(0.5), x, SOLVERS[name])
    assert torch.autograd.grad(3 * response, x)[0].item() == pytest.approx(0.75, rel=1e-11)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    ("method", "indefinite"),
    [
        (CG(max_steps=3000), False),
        (CG(max_steps=3000, preconditioner=Nystrom(rank=5, damping=1e-3)), False),
        (GMRES(), False),
        (MINRES(max_steps=3000), False),
        (Dense(), False),
        (GMRES(), True),
        (MINRES(max_steps=3000), True),
        (Dense(), True),
    ],
)
def test_ill_conditioned_stages(method, condition, indefinite):
    matrix = symmetric(spectrum(20, condition, indefinite=indefinite))
    assert (torch.linalg.eigvalsh(matrix) < 0).sum() == (10 if indefinite else 0)
    found, expected = pulled_back(matrix, replace(method, on_breakdown="raise"))
    assert zoo.relative_error(found, expected) < 1e-8


@pytest.mark.parametrize("shapes", [None, SHAPES])
@pytest.mark.parametrize("name", ["GMRES", "GMRES, restarted", "Dense"])
def test_non_symmetric_stages_are_solved_with_the_transposed_matrix(name, shapes):
    matrix = 2 * torch.eye(6) + 0.4 * torch.randn(6, 6)
    torch.manual_seed(1)
    found, expected = pulled_back(matrix, SOLVERS[name], shapes=shapes)
    assert zoo.relative_error(found, expected) < 1e-10
    torch.manual_seed(1)
    found, transposed = pulled_back(matrix.T.contiguous(), SOLVERS[name], shapes=shapes)
    assert zoo.relative_error(found, transposed) < 1e-10
    assert zoo.relative_error(expected, transposed) > 0.1  # so that the two can be told apart


@pytest.mark.parametrize("method", [CG(damping=0.3), GMRES(damping=0.3), MINRES(damping=0.3)])
def test_damping_is_a_multiple_of_the_identity(method):
    for matrix in [zoo.spd(6)] + ([symmetric([3.0, 2, 1, -1, -2, -3])] if not isinstance(method, CG) else []):
        found, expected = pulled_back(matrix, replace(method, on_breakdown="raise"), damping=0.3)
        assert zoo.relative_error(found, expected) < 1e-9


def test_damping_of_non_symmetric_stages():
    matrix = 2 * torch.eye(6) + 0.5 * torch.randn(6, 6)
    found, expected = pulled_back(matrix, GMRES(damping=0.3, on_breakdown="raise"), damping=0.3)
    assert zoo.relative_error(found, expected) < 1e-9


# --- by the engine ---------------------------------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("topology", zoo.TOPOLOGIES)
def test_every_graph(topology, name):
    """The stages have a frozen parameter, an unused one, and a 0-dim one."""
    if name in ("GMRES, restarted", "Dense") and topology != "two_levels":
        return
    stages, top = zoo.TOPOLOGIES[topology](SOLVERS[name])
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top)
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-10


@pytest.mark.parametrize("method", [GMRES(), MINRES(), Dense()])
def test_chains_of_indefinite_stages(method):
    hessian = symmetric([2.0, 1.5, 1.0, -0.5, -1.0, -2.0])
    stages, top = zoo.chain(replace(method, on_breakdown="raise"), length=3, hessian=hessian)
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top)
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-9


@pytest.mark.parametrize("c", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize(
    "method",
    [
        CG(max_steps=1),
        CG(rtol=0.0, preconditioner=Nystrom(rank=2, damping=0.1)),
        GMRES(max_steps=1),
        GMRES(rtol=0.0),
        MINRES(max_steps=1),
        MINRES(rtol=0.0),
        Neumann(terms=None, scale="auto", rtol=1e-13),
        Nystrom(rank=6, damping=1e-9),
    ],
)
def test_multiples_of_the_identity(c, method):
    stages, top = zoo.chain(replace(method, on_breakdown="raise"), length=2, hessian=c * torch.eye(6))
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top, lambda s: torch.eye(6) / (c + getattr(method, "damping", 0.0)))
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-12


@pytest.mark.parametrize("method", [CG, GMRES, MINRES])
def test_repeated_eigenvalues_need_a_step_for_each_different_one(method):
    stages, top = zoo.two_levels(method(max_steps=3, on_breakdown="raise"), hessian=symmetric([1.0, 1, 4, 4, 9, 9]))
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top)
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-10
    assert engine.step()["top"].solves["top/w"].statuses == {Status.CONVERGED: 1}


# --- nested --------------------------------------------------------------------------------------------------------

NESTED = ["CG, preconditioned", "GMRES", "MINRES", "Neumann"]
NESTED_SOLVERS = {n: replace(SOLVERS[n], rtol=1e-8 if n == "Neumann" else 1e-11) for n in NESTED}


@pytest.mark.parametrize("name", NESTED)
def test_three_quadratic_levels(name):
    levels, expected = quadratic_levels(NESTED_SOLVERS[name])
    assert zoo.relative_error(joined(mlo.Engine(levels).hypergradient("x")), expected) < 1e-7


@pytest.mark.parametrize("name", NESTED)
def test_three_other_levels(name):
    """Away from the solution, where `Dense` evaluates the same formula."""
    found = []
    for method in (NESTED_SOLVERS[name], Dense()):
        torch.manual_seed(0)
        found.append(joined(mlo.Engine(non_quadratic_levels(3, method)).hypergradient("t1")))
    assert zoo.relative_error(*found) < 1e-7


def test_nystrom_below_a_nested_stage_is_a_fixed_symmetric_operator():
    """With all columns it is the damped inverse, so conjugate gradients with that damping must agree."""
    found = []
    for method in (Nystrom(rank=3, damping=0.4), CG(damping=0.4, rtol=1e-12)):
        torch.manual_seed(0)
        levels = non_quadratic_levels(3, method)
        levels[1].hypergradient = Dense()
        found.append(joined(mlo.Engine(levels).hypergradient("t1")))
    assert zoo.relative_error(*found) < 1e-9


def by_newton(gradient, jacobian, n):
    w = torch.zeros(n)
    for _ in range(8):
        w = w - torch.linalg.solve(jacobian(w), gradient(w))
    assert gradient(w).norm() < 1e-14
    return w


@pytest.mark.parametrize(
    "method",
    [*(SOLVERS[n] for n in NESTED), GMRES(rtol=1e-12, warm_start=True), MINRES(rtol=1e-12, warm_start=True)],
)
def test_derivatives_of_solves(method):
    """`gradcheck` and `gradgradcheck` of x ↦ θ*(x), solved by Newton's method at each of its points."""
    a = symmetric([1.0, 2.0, 3.5])

    def loss(w, x):
        return 0.5 * w @ a @ w + torch.cosh(w).sum() - w @ torch.sin(x) - 0.1 * (w**3 * x).sum()

    def response(x):
        fixed = x.detach()
        gradient, hessian = torch.func.grad(loss), torch.func.hessian(loss)
        w = by_newton(lambda w: gradient(w, fixed), lambda w: hessian(w, fixed), 3)
        return mlo.best_response(loss, w, x, method, warm_starts={} if method.keeps_solutions else None)

    x = torch.tensor([0.3, -0.5, 0.8], requires_grad=True)
    assert torch.autograd.gradcheck(response, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(response, x, fast_mode=True)


@pytest.mark.parametrize("method", [GMRES(rtol=1e-12), GMRES(rtol=1e-12, restart=2, max_steps=1000)])
def test_derivatives_of_non_symmetric_solves(method):
    a = torch.tensor([[2.0, 0.6, 0.0], [-0.3, 1.5, 0.4], [0.5, -0.2, 1.8]])

    def response(x):
        fixed = x.detach()
        w = by_newton(lambda w: a @ w + torch.sin(w) - fixed, lambda w: a + torch.diag(torch.cos(w)), 3)
        return mlo.best_response(lambda w, x: Field.apply(w, x, a), w, x, method)

    x = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    assert torch.autograd.gradcheck(response, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(response, x, fast_mode=True)


@pytest.mark.parametrize("method", [GMRES(rtol=1e-13), Dense(), GMRES(rtol=1e-13, warm_start=True)])
def test_third_derivatives_of_non_symmetric_solves(method):
    """Against a few steps θ ← θ − M g(θ, x) from the solution: each makes one more order of derivatives exact."""
    a = torch.tensor([[2.0, 0.6, 0.0], [-0.3, 1.5, 0.4], [0.5, -0.2, 1.8]])
    b = torch.tensor([[0.3, 0.5, -0.4], [-0.6, 0.2, 0.1], [0.4, 0.7, 0.5]])
    x, direction = torch.tensor([0.9, -0.8, 1.2]), torch.tensor([1.0, -0.7, 0.4])

    def g(w, x):  # neither the Jacobian nor its derivative is symmetric
        return a @ w + b @ torch.sin(w) - x

    fixed = by_newton(lambda w: g(w, x), lambda w: a + b @ torch.diag(torch.cos(w)), 3)
    inverse = torch.linalg.inv(a + b @ torch.diag(torch.cos(fixed)))

    def by_steps(x):
        w = fixed
        for _ in range(4):
            w = w - inverse @ g(w, x)
        return w

    def by_solves(x):
        starts = {} if method.keeps_solutions else None
        loss = lambda w, x: FieldLoss.apply(w, g(w, x))
        return mlo.best_response(loss, fixed, x, method, warm_starts=starts)

    found = []
    for response in (by_steps, by_solves):
        t = torch.zeros((), requires_grad=True)
        y = response(x + t * direction).pow(2) @ torch.tensor([1.0, 0.5, -2.0])
        for _ in range(3):
            (y,) = torch.autograd.grad(y, t, create_graph=True)
        found.append(y.item())
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert abs(found[0]) > 0.01


# --- steps, products and statuses ----------------------------------------------------------------------------------


@every_solver
def test_a_right_hand_side_of_zero_costs_nothing(name):
    result = solved(SOLVERS[name], zoo.spd(6), torch.zeros(6), shapes=SHAPES)
    assert torch.equal(result.vector, torch.zeros(6))
    if name != "Dense":
        assert (result.status, result.iterations, result.residual, result.products) == (Status.CONVERGED, 0, 0.0, 0)


def test_nystrom_at_a_right_hand_side_of_zero():
    result = solved(Nystrom(rank=2, damping=1.0), zoo.spd(6), torch.zeros(6), shapes=SHAPES)
    assert torch.equal(result.vector, torch.zeros(6))
    assert result.products == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", [*SOLVERS.values(), Nystrom(rank=2, damping=1.0)])
def test_values_that_are_not_finite(method, value):
    rhs = torch.randn(6)
    rhs[2] = value
    result = solved(method, zoo.spd(6), rhs, shapes=SHAPES)
    assert result.status is Status.NON_FINITE
    assert result.iterations == 0
    for i, j in ((0, 0), (2, 2), (5, 5)):
        matrix = zoo.spd(6)
        matrix[i, j] = value
        method_of_all = replace(method, rank=6) if isinstance(method, Nystrom) else method
        assert solved(method_of_all, matrix, torch.randn(6), shapes=SHAPES).status is Status.NON_FINITE


@pytest.mark.parametrize("method", [GMRES(), MINRES(), CG()])
def test_values_that_become_infinite_on_the_way_leave_the_steps_before(method):
    matrix, rhs = zoo.spd(6), torch.randn(6)
    two = solved(replace(method, max_steps=2), matrix, rhs)

    class Failing(System):
        def product(self, vector):
            result = super().product(vector)
            return tuple(t * math.inf for t in result) if self.products == 3 else result

    solution = method.solve(Failing(matrix, rhs))
    assert solution.status is Status.NON_FINITE
    assert solution.iterations == 2
    assert torch.equal(flat(solution.vector), two.vector)
    assert solution.relative_residual == two.residual


@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_at_most_as_many_products_as_unknowns(method, n):
    matrix = zoo.spd(n)
    result = solved(method(), matrix, torch.randn(n))
    assert result.status is Status.CONVERGED
    assert result.products == result.iterations <= n
    assert zoo.relative_error(result.vector, exact(matrix, result.system.flat)) < 1e-9


@pytest.mark.parametrize("method", [*KRYLOV, lambda **o: CG(preconditioner=Nystrom(rank=3, damping=0.5), **o)])
def test_the_reported_residual_is_the_one_of_the_result(method):
    matrix, rhs = zoo.spd(12, shift=0.1), torch.randn(12)
    sizes = []
    for steps in range(1, 8):
        result = solved(method(max_steps=steps, damping=0.05), matrix, rhs)
        residual = rhs - matrix @ result.vector - 0.05 * result.vector
        assert result.residual == pytest.approx((residual.norm() / rhs.norm()).item(), rel=1e-8)
        assert result.iterations == steps
        assert result.status is Status.TRUNCATED
        sizes.append(result.residual)
    if method in (GMRES, MINRES):
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("method", KRYLOV)
def test_tolerances(method):
    matrix, rhs = symmetric(spectrum(30, 1e3)), torch.randn(30)
    size = rhs.norm().item()
    loose, tight = (solved(method(rtol=rtol, max_steps=500), matrix, rhs) for rtol in (1e-2, 1e-6))
    assert loose.status is tight.status is Status.CONVERGED
    assert loose.iterations < tight.iterations
    for result, rtol in ((loose, 1e-2), (tight, 1e-6)):
        before = solved(method(rtol=0.0, max_steps=result.iterations - 1), matrix, rhs)
        assert result.residual <= rtol < before.residual  # and so at the first step that is good enough
    absolute = solved(method(rtol=0.0, atol=1e-2 * size, max_steps=500), matrix, rhs)
    assert torch.equal(absolute.vector, loose.vector)
    assert absolute.status is Status.CONVERGED
    either = solved(method(rtol=1e-6, atol=1e-2 * size, max_steps=500), matrix, rhs)
    assert torch.equal(either.vector, loose.vector)
    either = solved(method(rtol=1e-2, atol=1e-6 * size, max_steps=500), matrix, rhs)
    assert torch.equal(either.vector, loose.vector)
    nothing = solved(method(atol=2 * size), matrix, rhs)
    assert (nothing.status, nothing.iterations, nothing.products) == (Status.CONVERGED, 0, 0)
    assert torch.equal(nothing.vector, torch.zeros(30))


# --- against SciPy ---------------------------------------------------------------------------------------------------


def array(t):
    return t.numpy().astype(np.float64)


@pytest.mark.parametrize("indefinite", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13])
def test_the_same_iterates_as_scipy(steps, indefinite):
    matrix, rhs = symmetric(spectrum(20, 50.0, indefinite=indefinite)), torch.randn(20)
    theirs, _ = scipy.sparse.linalg.minres(array(matrix), array(rhs), rtol=1e-14, maxiter=steps)
    ours = solved(MINRES(max_steps=steps), matrix, rhs)
    assert zoo.relative_error(ours.vector, torch.tensor(theirs)) < 1e-10
    theirs, _ = scipy.sparse.linalg.minres(array(matrix), array(rhs), rtol=1e-14, maxiter=steps, shift=-0.01)
    ours = solved(MINRES(max_steps=steps, damping=0.01), matrix, rhs)
    assert zoo.relative_error(ours.vector, torch.tensor(theirs)) < 1e-10
    theirs, _ = scipy.sparse.linalg.gmres(array(matrix), array(rhs), rtol=1e-14, restart=steps, maxiter=1)
    ours = solved(GMRES(max_steps=steps), matrix, rhs)
    assert zoo.relative_error(ours.vector, torch.tensor(theirs)) < 1e-10
    if not indefinite:
        theirs, _ = scipy.sparse.linalg.cg(array(matrix), array(rhs), rtol=1e-14, maxiter=steps)
        ours = solved(CG(max_steps=steps), matrix, rhs)
        assert zoo.relative_error(ours.vector, torch.tensor(theirs)) < 1e-10


def test_indefinite_stages_with_balanced_eigenvalues():
    """λᵀHλ = 0 on every second Krylov space: nothing is won there, and nothing is the matter either."""
    matrix, rhs = torch.diag(torch.tensor([1.0, -1, 2, -2, 3, -3])), torch.ones(6)
    for steps in range(1, 6):
        theirs, _ = scipy.sparse.linalg.minres(array(matrix), array(rhs), rtol=1e-14, maxiter=steps)
        for method in (MINRES, GMRES):
            result = solved(method(max_steps=steps), matrix, rhs)
            assert result.status is Status.TRUNCATED
            assert torch.allclose(result.vector, torch.tensor(theirs), atol=1e-13)
            assert result.residual == pytest.approx(((rhs - matrix @ result.vector).norm() / rhs.norm()).item())


@pytest.mark.parametrize("cycles", [1, 2, 5])
@pytest.mark.parametrize("restart", [1, 3, 7])
def test_the_same_restarts_as_scipy(restart, cycles):
    matrix, rhs = 2 * torch.eye(20) + 0.3 * torch.randn(20, 20), torch.randn(20)
    theirs, _ = scipy.sparse.linalg.gmres(array(matrix), array(rhs), rtol=1e-14, restart=restart, maxiter=cycles)
    ours = solved(GMRES(max_steps=restart * cycles, restart=restart), matrix, rhs)
    assert zoo.relative_error(ours.vector, torch.tensor(theirs)) < 1e-10
    assert ours.products == restart * cycles + cycles - 1
    assert ours.status is Status.TRUNCATED
    one_more = solved(GMRES(max_steps=restart * cycles + 1, restart=restart), matrix, rhs)
    assert (one_more.iterations, one_more.products) == (restart * cycles + 1, restart * cycles + cycles + 1)
    assert one_more.residual < ours.residual


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_the_same_preconditioned_iterates_as_scipy(steps):
    matrix, rhs, nystrom = symmetric(spectrum(20, 1e3)), torch.randn(20), Nystrom(rank=6, damping=0.01)
    inverse = nystrom.inverse(System(matrix, rhs))
    dense = torch.stack([inverse((e,))[0] for e in torch.eye(20)])
    assert zoo.relative_error(dense, dense.T) < 1e-12
    theirs, _ = scipy.sparse.linalg.cg(array(matrix), array(rhs), rtol=1e-14, maxiter=steps, M=array(dense))
    ours = solved(CG(max_steps=steps, preconditioner=nystrom), matrix, rhs)
    # The recurrences amplify rounding: after nine steps, noise of 2e-16 in rhs alone changes the result by 1e-9.
    assert zoo.relative_error(ours.vector, torch.tensor(theirs)) < (1e-12 if steps < 9 else 1e-6)
    assert ours.products == steps + 6


def test_plain_conjugate_gradients_bit_for_bit():
    """The recurrences of Nocedal and Wright's algorithm 5.2 in a loop of its own."""
    matrix, rhs = symmetric(spectrum(20, 100.0)), torch.randn(20)
    x, r = torch.zeros(20), rhs
    p, rr = r, torch.linalg.vector_norm(r).item() ** 2
    for _ in range(9):
        ap = matrix @ p
        alpha = rr / (p @ ap).item()
        x = torch.add(x, p, alpha=alpha)
        r = torch.add(r, ap, alpha=-alpha)
        rr, previous = (r @ r).item(), rr
        p = torch.add(r, p, alpha=rr / previous)
    result = solved(CG(max_steps=9), matrix, rhs)
    assert torch.equal(result.vector, x)
    assert result.residual == math.sqrt(rr) / rhs.norm().item()


# --- singular systems -----------------------------------------------------------------------------------------------

SPECTRA = {
    "one zero": [0.0, 1, 2, 3, 4, 5, 6, 7],
    "three zeros": [0.0, 0, 0, 1, 2, 3, 4, 5],
    "indefinite": [0.0, 0, -1, -2, -3, 1, 2, 3],
    "rank one": [0.0, 0, 0, 0, 0, 0, 0, 2],
    "large": [0.0] * 10 + list(np.linspace(0.1, 1, 40) * (-1) ** np.arange(40)),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", [GMRES(), MINRES(max_steps=500), CG()])
def test_singular_systems_with_a_solution(method, spectrum):
    """From zero on, all vectors are in the range of H: the result is the shortest solution."""
    matrix = symmetric(SPECTRA[spectrum])
    if isinstance(method, CG) and min(SPECTRA[spectrum]) < 0:
        return
    rhs = matrix @ torch.randn(len(matrix))
    result = solved(method, matrix, rhs)
    assert result.status is Status.CONVERGED
    assert zoo.relative_error(result.vector, torch.linalg.pinv(matrix, hermitian=True) @ rhs) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", [GMRES(), MINRES(max_steps=2000), GMRES(restart=20, max_steps=2000)])
def test_singular_systems_without_a_solution(method, spectrum, dtype):
    matrix = symmetric(SPECTRA[spectrum])
    rhs = torch.randn(len(matrix))
    shortest = torch.linalg.pinv(matrix, hermitian=True) @ rhs
    result = solved(method, matrix.to(dtype), rhs.to(dtype))
    vector = result.vector.double()
    residual, least = rhs - matrix @ vector, rhs - matrix @ shortest
    tolerance = 1e-6 if dtype is torch.float64 else 1e-2
    assert result.status is Status.SINGULAR
    assert zoo.relative_error(residual, least) < tolerance
    assert result.residual == pytest.approx((least.norm() / rhs.norm()).item(), rel=1e-4)
    assert vector.norm() < 10 * shortest.norm() + 10  # it may have a part that H does not see, of bounded length
    assert result.products <= 12 * len(matrix)


@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradients_give_the_best_of_their_steps_at_a_singular_system(seed):
    torch.manual_seed(seed)
    matrix, rhs = symmetric([0.0, 1, 2, 3, 4, 5]), torch.randn(6)
    result = solved(CG(), matrix, rhs)
    each = [solved(CG(max_steps=k), matrix, rhs).residual for k in range(1, result.iterations + 1)]
    assert result.status is Status.SINGULAR
    assert min(each) < each[-1] / 2  # the last is not the best
    assert result.residual == pytest.approx(min(each), rel=1e-10)
    assert result.residual == pytest.approx(((rhs - matrix @ result.vector).norm() / rhs.norm()).item(), rel=1e-8)


def test_a_least_squares_solution_stands_if_the_steps_run_out_behind_it():
    matrix, rhs = symmetric(SPECTRA["large"]), torch.randn(50)
    shortest = torch.linalg.pinv(matrix, hermitian=True) @ rhs
    statuses = collections.Counter()
    for steps in range(40, 200, 3):
        result = solved(MINRES(max_steps=steps), matrix, rhs)
        statuses[result.status] += 1
        assert result.vector.norm() < 10 * shortest.norm()
        assert result.residual == pytest.approx(((rhs - matrix @ result.vector).norm() / rhs.norm()).item(), rel=1e-8)
    assert statuses.keys() == {Status.TRUNCATED, Status.SINGULAR}


def test_small_eigenvalues_may_look_like_a_least_squares_solution_and_are_not():
    """After one step H hardly sees the residual; with the second, it more than halves."""
    matrix, rhs = torch.diag(torch.tensor([1.0, 1e-9, 3e-9])), torch.ones(3)
    one, two, more = (solved(MINRES(max_steps=steps), matrix, rhs) for steps in (1, 2, 50))
    assert one.residual == pytest.approx(math.sqrt(2 / 3), rel=1e-6)
    assert two.residual == pytest.approx(math.sqrt(0.4 / 3), rel=1e-6)  # min over a of (1 − a)² + (1 − 3a)² is 0.4
    assert one.status is two.status is Status.TRUNCATED
    assert more.status.ok
    assert zoo.relative_error(more.vector, torch.tensor([1.0, 1e9, 1e9 / 3])) < 1e-6


@pytest.mark.parametrize("method", [GMRES(), MINRES()])
def test_right_hand_sides_that_the_matrix_does_not_see(method):
    matrix = symmetric([0.0, 0, 1, -2, 3, -1, 2, 1])
    values, vectors = torch.linalg.eigh(matrix)
    rhs = vectors[:, values.abs().argmin()]  # to rounding, which tells the solver the way to other eigenvectors
    result = solved(method, matrix, rhs)
    assert result.status is Status.SINGULAR
    assert result.vector.norm() < 1
    assert result.residual == pytest.approx((rhs - matrix @ result.vector).norm().item(), rel=1e-6)
    result = solved(method, torch.diag(torch.tensor([0.0, 1.0, -2.0])), torch.tensor([1.0, 0, 0]))
    assert result.status is Status.SINGULAR
    assert torch.equal(result.vector, torch.zeros(3))


def test_elimination_tells_a_rotated_singular_matrix_and_gives_the_solution_of_least_norm():
    """A zero eigenvalue is one of rounding after a rotation."""
    matrix, rhs = symmetric([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), torch.randn(6)
    assert torch.linalg.svdvals(matrix)[-1] > 0
    result = solved(Dense(), matrix, rhs)
    assert result.status is Status.SINGULAR
    least = np.linalg.lstsq(matrix.numpy(), rhs.numpy(), rcond=1e-12)[0]
    assert zoo.relative_error(result.vector, torch.as_tensor(least)) < 1e-12


def test_elimination_reports_the_share_of_the_residual():
    result = solved(Dense(), torch.diag(torch.tensor([2.0, 0.0])), torch.tensor([3.0, 4.0]))
    assert (result.status, result.residual) == (Status.SINGULAR, pytest.approx(0.8, rel=1e-14))
    assert zoo.relative_error(result.vector, torch.tensor([1.5, 0.0])) < 1e-14


def test_a_truncated_series_reports_the_share_of_the_residual_before_its_last_term():
    """(I − SH)ᵏc with SH = ½."""
    for rhs in (torch.tensor([3.0, -4.0]), torch.tensor([3e-5, 0.0])):
        result = solved(Neumann(terms=4, scale=0.25, rtol=0.0), 2 * torch.eye(2), rhs)
        assert (result.status, result.iterations, result.products) == (Status.TRUNCATED, 4, 3)
        assert result.residual == pytest.approx(0.5**3, rel=1e-14)
        assert zoo.relative_error(result.vector, 0.25 * (1 + 0.5 + 0.25 + 0.125) * rhs) < 1e-14


def test_the_curvature_of_a_direction_is_measured_by_its_own_length():
    """The second direction is (0, 30) at a residual of length 9.5: the two lengths would disagree on what is flat."""
    rhs = torch.tensor([1.0, 3.0])
    flat = solved(CG(), torch.diag(torch.tensor([1.0, 1e-16])), rhs)  # the curvature met before is 0.1
    assert (flat.status, flat.iterations) == (Status.SINGULAR, 1)
    assert solved(CG(), torch.diag(torch.tensor([1.0, 1e-15])), rhs).status is Status.CONVERGED


def test_nearly_singular_matrices_are_not_taken_for_singular():
    for condition, dtype in ((1e10, torch.float64), (1e4, torch.float32)):
        for small in (1 / condition, -1 / condition):
            matrix, rhs = torch.diag(torch.tensor([1.0, small, 2.0])).to(dtype), torch.ones(3, dtype=dtype)
            for method in (GMRES(), MINRES()):
                result = solved(method, matrix, rhs)
                assert result.status in (Status.CONVERGED, Status.TRUNCATED)
                assert zoo.relative_error(result.vector, torch.tensor([1.0, 1 / small, 0.5])) < 1e-3


def test_gmres_says_so_where_the_krylov_space_has_no_solution():
    """H e₂ = e₁ and H e₁ = 0: the solution of H λ = e₁ is outside of the space that e₁ spans."""
    result = solved(GMRES(), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]))
    assert (result.status, result.products) == (Status.SINGULAR, 1)
    assert torch.equal(result.vector, torch.zeros(2))


def test_gmres_may_stand_still_until_the_last_step():
    """A cyclic shift: the first n − 1 steps find nothing, and neither does any restart before."""
    n = 8
    shift, rhs = torch.eye(n).roll(1, 0), torch.eye(n)[0]
    result = solved(GMRES(), shift, rhs)
    assert (result.status, result.iterations) == (Status.CONVERGED, n)
    assert torch.allclose(result.vector, shift.T @ rhs, atol=1e-14)
    result = solved(GMRES(restart=n - 1), shift, rhs)
    assert (result.status, result.products) == (Status.TRUNCATED, n)  # a second cycle would be the same again
    assert torch.equal(result.vector, torch.zeros(n))


def test_conjugate_gradients_keep_their_statuses_with_a_preconditioner():
    preconditioned = CG(preconditioner=Nystrom(rank=3, damping=0.1))
    semidefinite = symmetric([0.0, 0, 1, 2, 3, 4])
    assert solved(preconditioned, semidefinite, torch.randn(6)).status is Status.SINGULAR
    result = solved(preconditioned, semidefinite, semidefinite @ torch.randn(6))
    assert result.status is Status.CONVERGED
    assert solved(preconditioned, -zoo.spd(6), torch.randn(6)).status is Status.NEGATIVE_CURVATURE
    assert solved(preconditioned, torch.zeros(6, 6), torch.randn(6)).status is Status.SINGULAR
    small_damping = CG(preconditioner=Nystrom(rank=3, damping=1e-9))
    assert solved(small_damping, semidefinite, torch.randn(6)).status is Status.SINGULAR
    # The first direction is nearly all in the kernel, which is known from what the preconditioner saw of H.
    all_columns = CG(preconditioner=Nystrom(rank=3, damping=1e-9))
    result = solved(all_columns, torch.diag(torch.tensor([1.0, 0.0, 0.5])), torch.ones(3))
    assert (result.status, result.iterations) == (Status.SINGULAR, 0)


# --- restarts, memory and warm starts --------------------------------------------------------------------------------


def test_gmres_begins_anew_once_the_space_is_exhausted():
    """With rtol = 0 it refines until a cycle finds no more, and tells the residual it has, not what it believes."""
    matrix, rhs = symmetric(spectrum(12, 1e6)), torch.randn(12)
    once, again = solved(GMRES(), matrix, rhs), solved(GMRES(rtol=0.0, max_steps=500), matrix, rhs)
    assert (once.status, once.products) == (Status.CONVERGED, 12)
    assert (again.status, again.products % 13) == (Status.TRUNCATED, 0)
    residuals = [((rhs - matrix @ r.vector).norm() / rhs.norm()).item() for r in (once, again)]
    assert again.residual == pytest.approx(residuals[1], rel=1e-2)
    assert residuals[1] <= residuals[0] < 1e-10
    assert again.iterations < 200
    nearly = torch.tensor([[1.0, 1e-6], [1e-6, 2.0]])  # one vector spans it but for 1e-6, which is no rounding
    result = solved(GMRES(), nearly, torch.tensor([1.0, 0.0]))
    assert (result.status, result.products) == (Status.CONVERGED, 2)


def test_minres_forms_the_residual_where_its_recurrences_lose_it():
    matrix, rhs = symmetric(spectrum(20, 1e6, indefinite=True)), torch.randn(20)
    result = solved(MINRES(max_steps=1000), matrix, rhs)
    residual = (rhs - matrix @ result.vector).norm() / rhs.norm()
    assert result.status is Status.CONVERGED
    assert residual < 1.1e-10  # the recurrences alone believe so at 2e-8
    assert result.residual == pytest.approx(residual.item(), rel=0.2)
    assert result.products > result.iterations
    for condition in (3e4, 1e5):
        checked = solved(MINRES(max_steps=1000), symmetric(spectrum(20, condition)), rhs)
        assert checked.products > checked.iterations
    easy = solved(MINRES(), symmetric(spectrum(20, 10.0)), rhs)
    assert easy.products == easy.iterations


class Watched(System):
    """Counts the tensors of the system's size that are alive during each product."""

    def product(self, vector):
        result = super().product(vector)
        self.asked.clear()
        self.alive = (
            [*getattr(self, "alive", []), self.count()] if self.products in (6, 26) else getattr(self, "alive", [])
        )
        return result

    def count(self):
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(isinstance(o, torch.Tensor) and o.shape == (60,) for o in gc.get_objects())


@pytest.mark.parametrize(("method", "growth"), [(MINRES(), 0), (GMRES(), 20), (GMRES(restart=20), 0)])
def test_memory(method, growth):
    system = Watched(symmetric(spectrum(60, 1e6)), torch.randn(60))
    method.solve(system)
    assert abs(system.alive[1] - system.alive[0] - growth) <= 2


@pytest.mark.parametrize("method", KRYLOV)
def test_a_warm_start_begins_from_the_solution_before(method):
    matrix, rhs = symmetric(spectrum(40, 100.0)), torch.randn(40)
    cold = solved(method(rtol=1e-6), matrix, rhs)
    near = cold.vector + 1e-4 * torch.randn(40)
    assert solved(method(rtol=1e-6), matrix, rhs, last=near).products == cold.products
    warm = solved(method(rtol=1e-6, warm_start=True), matrix, rhs, last=near)
    assert warm.status is Status.CONVERGED
    assert warm.products == warm.iterations + 1 < cold.products
    assert warm.residual == pytest.approx(((rhs - matrix @ warm.vector).norm() / rhs.norm()).item(), rel=1e-6)
    assert warm.residual <= 1e-6
    same = solved(method(warm_start=True), matrix, rhs, last=exact(matrix, rhs))
    assert (same.status, same.iterations, same.products) == (Status.CONVERGED, 0, 1)
    damped = solved(method(warm_start=True, damping=0.2), matrix, rhs, last=exact(matrix, rhs, 0.2))
    assert (damped.status, damped.iterations, damped.products) == (Status.CONVERGED, 0, 1)
    far = solved(method(rtol=1e-6, warm_start=True), matrix, rhs, last=100 * torch.randn(40))
    assert torch.equal(far.vector, cold.vector)  # worse than zero: not begun from
    assert far.products == cold.products + 1


@pytest.mark.parametrize(
    "method", [GMRES(rtol=1e-6), MINRES(rtol=1e-6), CG(rtol=1e-6, preconditioner=Nystrom(rank=3, damping=0.1))]
)
def test_warm_starts_save_products_over_steps_of_the_engine(method):
    products = {}
    for warm in (False, True):
        torch.manual_seed(0)
        top = zoo.Target(reads=["w"])
        stage = zoo.Quadratic(
            "w",
            n=40,
            reads=["top"],
            size_of={"top": 6},
            hessian=symmetric(spectrum(40, 100.0)),
            hypergradient=replace(method, warm_start=warm),
        )
        top.targets["w"], top.mixed["w"] = torch.randn(40), torch.randn(6, 40)
        for group in (*stage.optimizer.param_groups, *top.optimizer.param_groups):
            group["lr"] = 1e-5  # the systems of two steps are nearly the same
        engine = mlo.Engine([stage, top])
        products[warm] = [engine.step()["top"].solves["top/w"].products for _ in range(3)]
    assert products[True][0] == products[False][0]
    assert all(w < c for w, c in zip(products[True][1:], products[False][1:], strict=True))


def test_neumann_with_a_learning_rate_for_each_group():
    """λ = S Σ (I − HS)ᵏ c with S the diagonal of the learning rates of two parameter groups."""
    hessian, mixed, target = zoo.spd(5), torch.randn(5, 2), torch.randn(5)
    rates = torch.tensor([0.05, 0.05, 0.05, 0.2, 0.2])

    class Stage(mlo.Problem):
        def training_step(self, batch):
            w = torch.cat(list(self.params.values()))
            return 0.5 * w @ hessian @ w - w @ mixed @ self.deps.top.params["x"]

    class Top(mlo.Problem):
        def training_step(self, batch):
            return torch.cat(list(self.deps.w.params.values())) @ target

    module = torch.nn.ParameterList([torch.zeros(3), torch.zeros(2)])
    groups = [{"params": [p], "lr": lr} for p, lr in zip(module, (0.05, 0.2), strict=True)]
    stage = Stage(
        "w", module, optimizer=torch.optim.SGD(groups), depends_on=["top"], hypergradient=Neumann(terms=4, rtol=0.0)
    )
    top = Top("top", torch.nn.ParameterDict({"x": torch.zeros(2)}), depends_on=["w"])
    s = torch.diag(rates)
    series = s @ sum(torch.linalg.matrix_power(torch.eye(5) - hessian @ s, k) for k in range(4))
    found = mlo.Engine([stage, top]).hypergradient("top")["x"]
    assert zoo.relative_error(found, mixed.T @ series @ target) < 1e-13


# --- the preconditioner -----------------------------------------------------------------------------------------------


def test_a_preconditioner_saves_products():
    spread = torch.cat([torch.logspace(5, 1, 30), 1 + torch.rand(270)])
    matrix, rhs = symmetric(spread), torch.randn(300)
    plain = solved(CG(max_steps=1000), matrix, rhs)
    nystrom = Nystrom(rank=40, damping=1.0)
    better = solved(CG(max_steps=1000, preconditioner=nystrom), matrix, rhs)
    assert plain.status is better.status is Status.CONVERGED
    assert better.products == better.iterations + 40
    assert better.products < plain.products / 2
    expected = exact(matrix, rhs)
    assert zoo.relative_error(better.vector, expected) < 1e-9
    damped = solved(CG(max_steps=1000, damping=2.0, preconditioner=nystrom), matrix, rhs)
    assert zoo.relative_error(damped.vector, exact(matrix, rhs, 2.0)) < 1e-9


def test_an_exact_preconditioner_needs_one_step():
    matrix, rhs = symmetric(spectrum(10, 1e4)), torch.randn(10)
    result = solved(CG(damping=0.01, preconditioner=Nystrom(rank=10, damping=0.01)), matrix, rhs)
    assert (result.status, result.iterations, result.products) == (Status.CONVERGED, 1, 11)
    assert zoo.relative_error(result.vector, exact(matrix, rhs, 0.01)) < 1e-10


def test_no_preconditioner_is_made_for_a_start_that_is_good_enough():
    matrix, rhs = zoo.spd(6), torch.randn(6)
    method = CG(warm_start=True, preconditioner=Nystrom(rank=6, damping=0.1))
    assert solved(method, matrix, rhs, last=exact(matrix, rhs)).products == 1


# --- Nyström ----------------------------------------------------------------------------------------------------------


def columns_of(result):
    """The numbers of the unit vectors that the solver asked for."""
    assert all(v.sum() == 1 and v.max() == 1 and v.count_nonzero() == 1 for v in result.system.asked)
    return [v.argmax().item() for v in result.system.asked]


@pytest.mark.parametrize("rank", [6, 7, 100])
@pytest.mark.parametrize(("condition", "damping"), [(10.0, 1.0), (1e6, 1e-3), (1e6, 1e-10), (1e2, 1e-12)])
def test_all_columns_give_the_damped_inverse(rank, condition, damping):
    matrix, rhs = symmetric(spectrum(6, condition)), torch.randn(6)
    result = solved(Nystrom(rank=rank, damping=damping), matrix, rhs, shapes=SHAPES)
    assert (result.status, result.products, result.iterations) == (Status.APPROXIMATE, 6, 6)
    assert result.residual is None
    assert columns_of(result) == list(range(6))
    # Woodbury's formula itself is off by 4e-2 in the third case.
    assert zoo.relative_error(result.vector, exact(matrix, rhs, damping)) < 1e-14 * condition + 1e-13


@pytest.mark.parametrize("shapes", [[(8,)], [(), (2, 2), (0,), (3, 1)], [(1,)] * 8])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_some_columns_give_the_formula_of_the_paper(rank, shapes):
    matrix, rhs = zoo.spd(8), torch.randn(8)
    for seed in range(4):
        result = solved(Nystrom(rank=rank, damping=0.2, seed=seed), matrix, rhs, shapes=shapes)
        chosen = columns_of(result)
        assert len(set(chosen)) == rank == result.products
        columns = matrix[:, chosen]
        low_rank = columns @ torch.linalg.inv(matrix[chosen][:, chosen]) @ columns.T
        assert zoo.relative_error(result.vector, exact(low_rank, rhs, 0.2)) < 1e-12


def test_columns_of_parameters_that_are_not_contiguous():
    matrix, x = zoo.spd(6), torch.ones(6, requires_grad=True)
    storage = torch.linalg.solve(matrix, torch.ones(6)).reshape(2, 3).T.contiguous()

    def loss(w, x):
        return 0.5 * w.reshape(-1) @ matrix @ w.reshape(-1) - w.reshape(-1) @ x

    assert not storage.T.is_contiguous()
    response = mlo.best_response(loss, storage.T, x, Nystrom(rank=6, damping=0.1))
    c = torch.randn(2, 3)
    (found,) = torch.autograd.grad((response * c).sum(), x)
    assert zoo.relative_error(found, exact(matrix, c.reshape(-1), 0.1)) < 1e-12


def test_columns_that_span_the_range_are_enough():
    factor = torch.randn(40, 5)
    matrix, rhs = factor @ factor.T, torch.randn(40)
    for rank in (5, 9, 20):  # with more, W is singular
        result = solved(Nystrom(rank=rank, damping=0.1), matrix, rhs)
        assert zoo.relative_error(result.vector, exact(matrix, rhs, 0.1)) < 1e-11


def test_the_approximation_lies_between_zero_and_the_matrix():
    matrix = symmetric(spectrum(12, 1e3))
    inverse = Nystrom(rank=4, damping=0.1).inverse(System(matrix, torch.randn(12)))
    dense = torch.stack([inverse((e,))[0] for e in torch.eye(12)])
    low_rank = torch.linalg.inv(dense) - 0.1 * torch.eye(12)
    assert torch.linalg.eigvalsh(low_rank)[0] > -1e-12
    assert torch.linalg.eigvalsh(matrix - low_rank)[0] > -1e-12
    assert torch.linalg.eigvalsh(low_rank)[-1].item() == pytest.approx(inverse.largest, rel=1e-10)


def test_negative_eigenvalues_are_left_out():
    matrix, rhs = symmetric([3.0, 2, 1, -1, -2, -3]), torch.randn(6)
    result = solved(Nystrom(rank=6, damping=0.5), matrix, rhs)
    values, vectors = torch.linalg.eigh(matrix)
    expected = vectors @ ((vectors.T @ rhs) / (values.clamp(min=0) + 0.5))
    assert zoo.relative_error(result.vector, expected) < 1e-12
    result = solved(Nystrom(rank=4, damping=0.5), -torch.eye(6), rhs)
    assert zoo.relative_error(result.vector, rhs / 0.5) < 1e-12
    result = solved(Nystrom(rank=4, damping=0.5), torch.zeros(6, 6), rhs)
    assert zoo.relative_error(result.vector, rhs / 0.5) < 1e-12


def test_columns_are_drawn_evenly_and_from_a_generator_of_its_own():
    before = torch.get_rng_state()
    counts = collections.Counter()
    for seed in range(600):
        counts[tuple(columns_of(solved(Nystrom(rank=2, damping=1.0, seed=seed), torch.eye(4), torch.ones(4))))] += 1
    assert torch.equal(torch.get_rng_state(), before)
    assert set(counts) == {(i, j) for i in range(4) for j in range(i + 1, 4)}
    assert all(65 < c < 140 for c in counts.values())  # 100 each are expected, with a standard deviation of 9
    again = [columns_of(solved(Nystrom(rank=2, damping=1.0, seed=7), torch.eye(9), torch.ones(9))) for _ in range(2)]
    assert again[0] == again[1]


def test_nystrom_through_the_engine():
    stages, top = zoo.dense(Nystrom(rank=6, damping=0.3, on_breakdown="raise"))
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top, lambda s: torch.linalg.inv(s.hessian + 0.3 * torch.eye(6)))
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-11
    stages, top = zoo.two_levels(Nystrom(rank=4, damping=0.3))
    assert mlo.Engine([*stages, top]).step()["top"].solves["top/w"].products == 4


# --- Neumann ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1.0, 1e-4, 1e6])
def test_the_automatic_scale_of_a_multiple_of_the_identity(c):
    rhs = torch.randn(6)
    for terms in (1, 2, 5):
        result = solved(Neumann(terms=terms, scale="auto", rtol=0.0), c * torch.eye(6), rhs, shapes=SHAPES)
        assert zoo.relative_error(result.vector, (1 - 0.2**terms) / c * rhs) < 1e-12  # scale·c = 1 / 1.25
        assert result.products == terms - 1 + 16


def test_the_automatic_scale_follows_the_largest_eigenvalue():
    rhs = torch.randn(40)
    for values in (spectrum(40, 100.0), torch.cat([torch.ones(1), torch.full((39,), 0.3)])):
        matrix = symmetric(values)
        result = solved(Neumann(terms=1, scale="auto"), matrix, rhs)
        assert 0.8 <= (result.vector.norm() / rhs.norm()).item() < 0.95  # 1 / 1.25 of an estimate from below
        converged = solved(Neumann(terms=None, scale="auto", rtol=1e-8), matrix, rhs)
        assert converged.status is Status.CONVERGED
        assert zoo.relative_error(converged.vector, exact(matrix, rhs)) < 1e-6


@pytest.mark.parametrize("n", [1, 3, 20])
def test_the_automatic_scale_never_diverges(n):
    """Nor where the right-hand side is orthogonal to the largest eigenvector, or along it."""
    for seed in range(10):
        torch.manual_seed(seed)
        matrix = symmetric(torch.rand(n) + 0.05)
        vectors = torch.linalg.eigh(matrix).eigenvectors
        for rhs in (torch.randn(n), vectors[:, -1].clone(), vectors[:, 0].clone()):
            result = solved(Neumann(terms=None, scale="auto", rtol=1e-6), matrix, rhs)
            assert result.status is Status.CONVERGED
            assert zoo.relative_error(result.vector, exact(matrix, rhs)) < 1e-4


def test_the_automatic_scale_draws_nothing_from_others_and_keeps_the_method_linear():
    matrix, a, b = zoo.spd(8), torch.randn(8), torch.randn(8)
    before = torch.get_rng_state()
    x, y, z = (solved(Neumann(terms=4, scale="auto", rtol=0.0), matrix, rhs).vector for rhs in (a, b, 2 * a - 3 * b))
    assert torch.equal(torch.get_rng_state(), before)
    assert zoo.relative_error(2 * x - 3 * y, z) < 1e-13


def test_a_series_until_converged():
    matrix, rhs = symmetric(spectrum(8, 20.0)), torch.randn(8)
    result = solved(Neumann(terms=None, scale=1.0, rtol=1e-9), matrix, rhs)
    assert result.status is Status.CONVERGED
    assert result.residual == pytest.approx(((rhs - matrix @ result.vector).norm() / rhs.norm()).item(), rel=0.1)
    assert result.products == result.iterations
    shorter = solved(Neumann(terms=result.iterations - 1, scale=1.0, rtol=0.0), matrix, rhs)
    assert shorter.status is Status.TRUNCATED
    assert result.residual <= 1e-9 < ((rhs - matrix @ shorter.vector).norm() / rhs.norm()).item() * 1.06
    assert solved(Neumann(terms=None, scale=3.0), matrix, rhs).status is Status.DIVERGED
    singular = solved(Neumann(terms=None, scale="auto"), symmetric([0.0, 1, 2, 3]), torch.randn(4))
    assert singular.status is Status.SINGULAR
    assert singular.iterations < 1000
    stuck = solved(Neumann(terms=None, scale="auto"), torch.diag(torch.tensor([1.0, 1e-5])), torch.ones(2))
    assert (stuck.status, stuck.iterations) == (Status.TRUNCATED, 10_000)
    assert solved(Neumann(terms=5, scale="auto"), torch.zeros(4, 4), torch.ones(4)).status is Status.SINGULAR


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 8, 9, 11])
def test_a_series_of_given_length_ends_with_the_residual_before_its_last_term(terms):
    """However seldom it is looked at on the way."""
    matrix, rhs = symmetric(spectrum(8, 20.0)), torch.randn(8)
    result = solved(Neumann(terms=terms, scale=1.0, rtol=0.0), matrix, rhs)
    shorter = solved(Neumann(terms=terms - 1, scale=1.0, rtol=0.0), matrix, rhs)
    assert (result.status, result.iterations, result.products) == (Status.TRUNCATED, terms, terms - 1)
    assert result.residual == pytest.approx(((rhs - matrix @ shorter.vector).norm() / rhs.norm()).item(), rel=1e-9)


@pytest.mark.parametrize(("terms", "iterations"), [(6, 5), (50, 8), (10_000, 8)])
def test_a_series_that_grows_is_given_up_while_it_is_finite(terms, iterations):
    result = solved(Neumann(terms=terms, scale=30.0, rtol=0.0), torch.eye(3), torch.ones(3))  # by 29 per term
    assert result.status is Status.DIVERGED
    assert result.vector.isfinite().all()
    assert result.iterations == iterations  # 29⁴ < 1e6; it is looked at after every fourth term, and near the end


@pytest.mark.parametrize("terms", [3, 4, 5, 6, 7, 8])
def test_a_series_that_grows_at_its_end_diverges_though_it_has_shrunk_before(terms):
    """One part of the residual is gone after a term, the other grows by 1.5 per term, still below the whole of c."""
    rhs = torch.tensor([100.0, 0.1])
    result = solved(Neumann(terms=terms, scale=1.0, rtol=0.0), torch.diag(torch.tensor([1.0, 2.5])), rhs)
    assert result.status is Status.DIVERGED
    assert result.residual == pytest.approx(0.1 * 1.5 ** (terms - 1) / rhs.norm().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "entry", "count"),
    [
        (torch.float32, 2.6e-23, 20_000),  # its square is zero, that of the first entry is not
        (torch.float32, 1e-20, 20_000),  # a square of few digits
        (torch.float32, 3e25, 50),
        (torch.float64, 1e-170, 50),
        (torch.float64, 3e-158, 50),  # a square of few digits
        (torch.float64, 1e-16, 50),
        (torch.float64, 3e170, 50),
    ],
)
def test_a_norm_is_right_where_squares_leave_the_range_of_the_dtype(dtype, entry, count):
    vector = torch.full((count,), entry, dtype=dtype)
    vector[0] *= 1.6
    expected = entry * math.sqrt(count - 1 + 1.6**2)
    assert norm([vector]) == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 1e-12, abs=0)
    assert norm([vector[:3], vector[3:]]) == pytest.approx(
        expected, rel=1e-4 if dtype == torch.float32 else 1e-12, abs=0
    )


def test_a_norm_over_two_dtypes_is_right_where_squares_leave_the_range_of_one():
    wide, narrow = torch.full((3,), 1e-25, dtype=torch.float64), torch.full((6,), 1e-25, dtype=torch.float32)
    for vectors in ([wide, narrow], [narrow, wide]):
        assert norm(vectors) == pytest.approx(3e-25, rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("method", "options"),
    [(mlo.ConjugateGradient, {"max_steps": 9, "rtol": 1e-6}), (mlo.Neumann, {"terms": 8, "scale": 0.5})],
)
def test_cotangents_whose_squares_underflow_in_part_are_solved_for_as_others(method, options):
    """Their norm is taken after they are brought near length 1: of the squares before only the largest is left."""
    diagonal = 1 + torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x = torch.ones(20_000, dtype=torch.float32, requires_grad=True)
    reports = []

    class Watched(method):
        def settle(self, stage, report):
            reports.append(report)
            super().settle(stage, report)

    c = torch.full((20_000,), 2.6e-23, dtype=torch.float32)
    c[0] = 4e-23
    loss = lambda w, x: (diagonal * w * w / 2).sum() - (w * x).sum()
    w = mlo.best_response(loss, x.detach() / diagonal, x, Watched(**options))
    torch.autograd.grad(w, x, c, retain_graph=True)
    torch.autograd.grad(w, x, c * 1e23)
    small, usual = reports
    assert (small.status, small.iterations) == (usual.status, usual.iterations)
    assert small.relative_residual == pytest.approx(usual.relative_residual, rel=0.2)


def test_conjugate_gradients_leave_their_arguments_alone():
    """What they begin with, the right-hand side or a kept solution, is not theirs to write to."""
    matrix, rhs, last = zoo.spd(6), torch.randn(6), torch.randn(6) * 0.01
    for options in ({}, {"warm_start": True}, {"preconditioner": Nystrom(rank=2, damping=0.5)}):
        system = System(matrix, rhs, SHAPES, last)
        before = [t.clone() for t in (*system.rhs, *system.last_solution)]
        mlo.ConjugateGradient(max_steps=4, rtol=0.0, **options).solve(system)
        assert all(map(torch.equal, (*system.rhs, *system.last_solution), before))


def test_a_preconditioner_is_not_asked_for_a_direction_that_is_not_taken():
    matrix, rhs = zoo.spd(6), torch.randn(6)
    asked = []

    class Counting(Nystrom):
        def inverse(self, system):
            inverse = super().inverse(system)

            class Counted:
                largest = inverse.largest

                def __call__(self, vector):
                    asked.append(1)
                    return inverse(vector)

            return Counted()

    mlo.ConjugateGradient(max_steps=3, rtol=0.0, preconditioner=Counting(rank=2, damping=0.5)).solve(
        System(matrix, rhs, SHAPES)
    )
    assert len(asked) == 3


# --- other dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [*SOLVERS.values(), Nystrom(rank=6, damping=0.2), GMRES(restart=2)])
def test_lower_precision(method, dtype):
    """The default tolerances are below their rounding, which must neither keep the solvers going nor be an error."""
    matrix, rhs = zoo.spd(6), torch.randn(6)
    method = method if isinstance(method, Nystrom | Dense) else replace(method, rtol=1e-12)
    result = solved(method, matrix.to(dtype), rhs.to(dtype), shapes=SHAPES)
    unit = torch.finfo(dtype).eps
    damping = method.damping if isinstance(method, Nystrom) else 0.0
    assert zoo.relative_error(result.vector.double(), exact(matrix, rhs, damping)) < 10 * unit
    assert result.status.ok
    assert result.products <= 80


def test_mixed_dtypes():
    """Tensors of two dtypes, as in a model with a part in lower precision: the coarser one sets the tolerance."""
    matrix, rhs = zoo.spd(6), torch.randn(6)

    class Mixed(System):
        def cut(self, vector):
            a, b = super().cut(vector)
            return a.double(), b.float()

        def product(self, vector):
            self.products += 1
            return self.cut(self.matrix @ torch.cat([t.double() for t in vector]))

    methods = [m for m in SOLVERS.values() if not isinstance(m, Dense)]
    for method in [*methods, Nystrom(rank=6, damping=1e-9)]:
        solution = method.solve(Mixed(matrix, rhs, [(3,), (3,)]))
        assert [t.dtype for t in solution.vector] == [torch.float64, torch.float32]
        assert solution.status.ok
        assert zoo.relative_error(torch.cat([t.double() for t in solution.vector]), exact(matrix, rhs)) < 1e-5


def test_squares_beyond_the_range_of_the_dtype_end_a_solve():
    for method in (CG(rtol=0.0), CG(rtol=0.0, preconditioner=Nystrom(rank=2, damping=0.1)), GMRES(rtol=0.0)):
        for seed in range(8):
            torch.manual_seed(seed)
            matrix, rhs = zoo.spd(3).to(torch.bfloat16), torch.randn(3).to(torch.bfloat16)
            result = solved(replace(method, max_steps=300), matrix, rhs)
            assert zoo.relative_error(result.vector.double(), exact(matrix.double(), rhs.double())) < 0.1


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "(max_steps=0): expected an integer of at least 1."),
        ({"max_steps": 2.0}, "(max_steps=2.0): expected an integer of at least 1."),
        ({"rtol": 1}, "(rtol=1): expected a number in [0, 1)."),
        ({"rtol": -1e-3}, "(rtol=-0.001): expected a number in [0, 1)."),
        ({"rtol": math.nan}, "(rtol=nan): expected a number in [0, 1)."),
        ({"atol": -1.0}, "(atol=-1.0): expected a number of at least 0."),
        ({"atol": math.inf}, "(atol=inf): expected a number of at least 0."),
        ({"damping": -1}, "(damping=-1): expected a number of at least 0."),
        ({"warm_start": 1}, "(warm_start=1): expected True or False."),
        ({"on_breakdown": "ignore"}, "(on_breakdown='ignore'): expected one of 'warn', 'raise', 'skip'."),
    ],
)
def test_options_of_krylov_methods(method, options, message):
    with pytest.raises(mlo.ConfigurationError, match=re.escape(method.__name__ + message)):
        method(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GMRES(restart=0), "GMRES(restart=0): expected an integer of at least 1, or None."),
        (lambda: GMRES(restart=True), "GMRES(restart=True): expected"),
        (lambda: CG(preconditioner=3), "ConjugateGradient(preconditioner=3): expected a Nystrom such as"),
        (lambda: CG(preconditioner=Nystrom), "ConjugateGradient(preconditioner=<class"),
        (lambda: Nystrom(rank=0, damping=1.0), "Nystrom(rank=0): expected an integer of at least 1."),
        (lambda: Nystrom(rank=1.5, damping=1.0), "Nystrom(rank=1.5): expected"),
        (lambda: Nystrom(rank=1, damping=0.0), "Nystrom(damping=0.0): expected a positive number."),
        (lambda: Nystrom(rank=1, damping=-1.0), "Nystrom(damping=-1.0): expected a positive number."),
        (lambda: Nystrom(rank=1, damping=1.0, seed=0.5), "Nystrom(seed=0.5): expected an integer."),
        (lambda: Nystrom(rank=1, damping=1.0, seed=True), "Nystrom(seed=True): expected an integer."),
        (lambda: Neumann(terms=0), "Neumann(terms=0): expected an integer of at least 1, or None to go on until"),
        (lambda: Neumann(scale="sgd"), "Neumann(scale='sgd'): expected a positive number, or None"),
        (lambda: Neumann(terms=None, rtol=0.0), "Neumann(rtol=0.0): expected a positive number with terms=None"),
    ],
)
def test_options_of_the_others(make, message):
    with pytest.raises(mlo.ConfigurationError, match=re.escape(message)):
        make()


def test_options_that_are_right():
    assert CG(50, 1e-6, 0.1, True) == CG(max_steps=50, rtol=1e-6, damping=0.1, warm_start=True)
    assert GMRES(50, 1e-6, 0.1, 10, 0.2, True).restart == 10
    assert MINRES(np.int64(5), np.float32(0.5), 0, 0, False).max_steps == 5
    assert Nystrom(3, 0.1, np.int64(4)).seed == 4
    assert not Neumann(scale="auto").needs_learning_rate
    assert Neumann().needs_learning_rate
    assert GMRES(warm_start=True).keeps_solutions
    assert not MINRES().keeps_solutions
    assert not GMRES.assumes_symmetric
    assert all(m.assumes_symmetric for m in (MINRES, Nystrom, CG))
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(mlo.ConfigurationError, match="warm_starts="):
        mlo.best_response(lambda w, x: (w - x).square().sum(), torch.ones(2), x, MINRES(warm_start=True))


# --- one multiple of the identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "scale", "status"),
    [
        (3.0, 0.5, Status.APPROXIMATE),
        (3.0, 1e30, Status.APPROXIMATE),
        (3.0, 1e38, Status.APPROXIMATE),
        (4.0, 1e38, Status.NON_FINITE),  # float32 ends at 3.4e38
        (math.nan, 0.5, Status.NON_FINITE),
        (math.inf, 0.5, Status.NON_FINITE),
    ],
)
def test_a_multiple_that_leaves_the_range_of_the_dtype_is_noticed(entry, scale, status):
    rhs = torch.tensor([0.0, entry], dtype=torch.float32)
    result = solved(mlo.Identity(scale=scale), torch.eye(2, dtype=torch.float32), rhs)
    assert result.status is status
    assert (result.products, result.iterations) == (0, 0)
    if status.ok:
        assert torch.equal(result.vector, scale * rhs)
