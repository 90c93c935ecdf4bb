"""Hypergradients against libraries and loops that share no code with this one, in float64.

Where the other side takes the same steps (k steps of conjugate gradients, k terms of a Neumann series, k optimizer
steps) the truncated values must agree too, not only the converged ones. The libraries come with the extra `peers`
(`make test` installs them); a test whose library is missing is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from sklearn.datasets import make_regression
from torch import Tensor, nn

import mlo

# TorchOpt calls functions under names that torch has given up; higher warns of every RMSprop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:We've integrated functorch:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Differentiable RMSprop:UserWarning"),
]

PEERS = "comes with the extra 'peers', which `make test` installs"
# Two programs of the same recurrences differ by rounding, which conjugate gradients amplify from step to step.
SAME = 1e-9


# --- two problems with parameters in two tensors ---------------------------------------------------------------


class Ridge:
    """½ mean (Xw − y)² + ½ Σ exp(x) w², one penalty per coordinate; the upper loss is ½ mean (Vw − u)² + ½ Σ x²."""

    def __init__(self, n=12):
        self.x_train, self.y_train = torch.randn(30, n) * torch.logspace(0, -0.7, n), torch.randn(30)
        self.x_valid, self.y_valid = torch.randn(20, n), torch.randn(20)
        self.at = torch.randn(n) - 2
        matrix = self.x_train.T @ self.x_train / 30 + torch.diag(self.at.exp())
        self.solution = self.split(torch.linalg.solve(matrix, self.x_train.T @ self.y_train / 30))

    @staticmethod
    def split(w):
        return w[:6].reshape(2, 3), w[6:]

    @staticmethod
    def flat(w):
        return torch.cat([t.reshape(-1) for t in w])

    def loss(self, w, x):
        w = self.flat(w)
        return 0.5 * (self.x_train @ w - self.y_train).square().mean() + 0.5 * (x.exp() * w.square()).sum()

    def upper(self, w, x):
        return 0.5 * (self.x_valid @ self.flat(w) - self.y_valid).square().mean() + 0.5 * x.square().sum()


class Weighted(Ridge):
    """Logistic regression whose examples are weighted by sigmoid(x), with a fixed penalty: not quadratic in w."""

    def __init__(self, n=12):
        super().__init__(n)
        self.y_train = (self.y_train > 0).to(self.x_train.dtype)
        self.at = torch.randn(30)
        w = torch.zeros(n)
        for _ in range(30):  # Newton's method
            gradient = torch.func.grad(lambda v: self.loss(self.split(v), self.at))(w)
            w = w - torch.linalg.solve(self.hessian(w), gradient)
        self.solution = self.split(w)

    def hessian(self, w):
        return torch.func.hessian(lambda v: self.loss(self.split(v), self.at))(w)

    def loss(self, w, x):
        w = self.flat(w)
        errors = nn.functional.binary_cross_entropy_with_logits(self.x_train @ w, self.y_train, reduction="none")
        return (x.sigmoid() * errors).mean() + 0.002 * w.square().sum()


PROBLEMS = {"ridge": Ridge, "logistic": Weighted}


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]()


def largest_eigenvalue(problem):
    w = problem.flat(problem.solution)
    hessian = torch.func.hessian(lambda v: problem.loss(problem.split(v), problem.at))(w)
    return torch.linalg.eigvalsh(hessian)[-1].item()


def exact(problem):
    """The implicit function theorem with the written-out Hessian."""
    w, x = problem.flat(problem.solution), problem.at
    loss = lambda v, x: problem.loss(problem.split(v), x)
    hessian = torch.func.hessian(loss)(w, x)
    mixed = torch.func.jacrev(torch.func.grad(loss), argnums=1)(w, x)
    direct, cotangent = torch.func.grad(lambda x, v: problem.upper(problem.split(v), x), argnums=(0, 1))(x, w)
    return direct - mixed.T @ torch.linalg.solve(hessian, cotangent)


def by_mlo(problem, method, **options):
    x = problem.at.clone().requires_grad_()
    solution = tuple(t.clone() for t in problem.solution)
    w = mlo.best_response(problem.loss, solution, x, method, **options)
    return torch.autograd.grad(problem.upper(w, x), x)[0]


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- TorchOpt: implicit differentiation of a root ----------------------------------------------------------------


def by_torchopt(problem, solve):
    implicit = pytest.importorskip("torchopt.diff.implicit", reason=PEERS)

    def solver(initial, x):
        return tuple(t.clone() for t in problem.solution)

    root = implicit.custom_root(torch.func.grad(problem.loss), argnums=1, solve=solve)(solver)
    x = problem.at.clone().requires_grad_()
    w = root(tuple(torch.zeros_like(t) for t in problem.solution), x)
    return torch.autograd.grad(problem.upper(w, x), x)[0]


@pytest.fixture
def linear_solve():
    return pytest.importorskip("torchopt.linear_solve", reason=PEERS)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_conjugate_gradient_steps_of_torchopt(problem, linear_solve, steps):
    theirs = by_torchopt(problem, linear_solve.solve_cg(maxiter=steps, rtol=0.0, atol=0.0))
    ours = by_mlo(problem, mlo.ConjugateGradient(max_steps=steps, rtol=0.0))
    assert error(ours, theirs) < SAME
    assert error(theirs, exact(problem)) > 1e-6  # still truncated: equality is no matter of convergence


def test_converged_conjugate_gradients_of_torchopt(problem, linear_solve):
    theirs = by_torchopt(problem, linear_solve.solve_cg(maxiter=100, rtol=1e-13, atol=0.0))
    ours = by_mlo(problem, mlo.ConjugateGradient(max_steps=100, rtol=1e-13))
    assert error(ours, theirs) < 1e-11
    assert error(ours, exact(problem)) < 1e-11


@pytest.mark.parametrize("steps", [2, 4])
def test_damped_conjugate_gradient_steps_of_torchopt(problem, linear_solve, steps):
    theirs = by_torchopt(problem, linear_solve.solve_cg(ridge=0.3, maxiter=steps, rtol=0.0, atol=0.0))
    ours = by_mlo(problem, mlo.ConjugateGradient(max_steps=steps, rtol=0.0, damping=0.3))
    assert error(ours, theirs) < SAME


def test_warm_started_conjugate_gradient_steps_of_torchopt(problem, linear_solve):
    found: list[Any] = []

    def solve(matvec, b):  # TorchOpt takes the start as an option, and solves for −λ
        start = found[-1] if found else None
        found.append(linear_solve.solve_cg(init=start, maxiter=3, rtol=0.0, atol=0.0)(matvec, b))
        return found[-1]

    kept: dict[str, Any] = {}
    method = mlo.ConjugateGradient(max_steps=3, rtol=0.0, warm_start=True)
    cold = by_mlo(problem, method, warm_starts=kept)
    assert error(cold, by_torchopt(problem, solve)) < SAME
    warm = by_mlo(problem, method, warm_starts=kept)
    assert error(warm, by_torchopt(problem, solve)) < SAME
    assert error(warm, exact(problem)) < 0.5 * error(cold, exact(problem))


@pytest.mark.parametrize("terms", [2, 3, 10, 40])
def test_neumann_terms_of_torchopt(problem, linear_solve, terms):
    scale = 1 / largest_eigenvalue(problem)
    # Its maxiter does not count the first term.
    theirs = by_torchopt(problem, linear_solve.solve_inv(ns=True, maxiter=terms - 1, alpha=scale))
    ours = by_mlo(problem, mlo.Neumann(terms=terms, scale=scale, rtol=0.0))
    assert error(ours, theirs) < 1e-12
    assert error(theirs, exact(problem)) > 1e-6


class Saddle(Ridge):
    """The first part of w minimises, the second maximises (with the sign of its own loss turned round)."""

    def loss(self, w, x):
        first, second = w
        pull = 0.4 * (first.reshape(-1) * second).sum()
        return super().loss((first, torch.zeros(6)), x) - super().loss((torch.zeros(2, 3), second), x) + pull

    def optimality(self, w, x):
        """What both parts of the optimizer bring to zero: its Jacobian is not symmetric."""
        by_first, by_second = torch.func.grad(self.loss)(w, x)
        return by_first, -by_second

    def by_engine(self, method):
        problem = self

        class Lower(mlo.Problem):
            def training_step(self, batch):
                return problem.loss(tuple(self.params.values()), self.deps.top.params["x"])

        class Upper(mlo.Problem):
            def training_step(self, batch):
                return problem.upper(tuple(self.deps.low.params.values()), self.params["x"])

        parameters = nn.ParameterDict(dict(zip("ab", problem.solution, strict=True)))
        groups = [{"params": [parameters["a"]]}, {"params": [parameters["b"]], "maximize": True}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        low = Lower("low", parameters, optimizer=optimizer, depends_on=["top"], hypergradient=method)
        upper = nn.ParameterDict({"x": problem.at.clone()})
        return mlo.Engine([low, Upper("top", upper, depends_on=["low"])]).hypergradient("top")["x"]


@pytest.mark.parametrize("method", [mlo.GMRES(rtol=1e-13), mlo.Dense()], ids=["gmres", "dense"])
def test_normal_equations_of_torchopt_at_a_non_symmetric_root(linear_solve, method):
    problem = Saddle()
    implicit = pytest.importorskip("torchopt.diff.implicit", reason=PEERS)
    solve = linear_solve.solve_normal_cg(maxiter=200, rtol=1e-14, atol=0.0)
    root = implicit.custom_root(problem.optimality, argnums=1, solve=solve)(lambda initial, x: problem.solution)
    x = problem.at.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(problem.upper(root(problem.solution, x), x), x)
    assert error(problem.by_engine(method), theirs) < 1e-11
    symmetric = problem.by_engine(mlo.ConjugateGradient(max_steps=12))
    assert error(symmetric, theirs) > 1e-2


def test_torchopt_gives_zero_for_a_root_of_no_dimension(linear_solve):
    """Why no problem here has a 0-dim root: w*(x) = sqrt(x) has the derivative ¼ at 4, and TorchOpt says 0."""
    implicit = pytest.importorskip("torchopt.diff.implicit", reason=PEERS)
    x = torch.tensor(4.0, requires_grad=True)
    root = implicit.custom_root(lambda w, x: w.square() - x, argnums=1, solve=linear_solve.solve_cg())
    (theirs,) = torch.autograd.grad(root(lambda initial, x: x.sqrt())(torch.tensor(1.0), x), x)
    assert theirs == 0
    w = mlo.best_response(lambda w, x: w**3 / 3 - w * x, torch.tensor(2.0), x, mlo.ConjugateGradient())
    assert torch.autograd.grad(w, x)[0].item() == pytest.approx(0.25, rel=1e-12)


# --- JAXopt's ridge test ------------------------------------------------------------------------------------------

# In a process of its own: JAX starts threads, and warns of every later fork.
_JAXOPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import jax, jax.numpy as jnp
from jaxopt import implicit_diff, linear_solve
given = json.load(sys.stdin)
X, y = jnp.asarray(given["X"]), jnp.asarray(given["y"])
identity = jnp.eye(X.shape[1])

def objective(w, penalty, X, y):
    return jnp.mean((X @ w - y) ** 2) + 0.5 * jnp.sum(penalty * w ** 2)

def solution(initial, penalty, X, y):
    gram = 2 * X.T @ X / len(X) + penalty * identity
    return jnp.linalg.solve(gram, 2 * X.T @ y / len(X))

def jacobian(penalty, **options):
    solve = lambda matvec, b: linear_solve.solve_cg(matvec, b, **options)
    root = implicit_diff.custom_root(jax.grad(objective), solve=solve)(solution)
    return jax.jacrev(root, argnums=1)(None, penalty, X, y).tolist()

one, each = jnp.asarray(given["one"]), jnp.asarray(given["each"])
print(json.dumps({
    "solution": solution(None, one, X, y).tolist(),
    "one": jacobian(one, maxiter=100, tol=1e-14),
    "each": jacobian(each, maxiter=100, tol=1e-14),
    "truncated": [jacobian(each, maxiter=k, tol=0.0) for k in (1, 2, 3, 4)],
}))
"""


def test_the_ridge_test_of_jaxopt():
    """The Jacobian of a ridge solution in its penalty (as in JAXopt's tests) and in one penalty per coordinate."""
    if find_spec("jaxopt") is None:
        pytest.skip(PEERS)
    x, y = make_regression(n_samples=40, n_features=6, random_state=0)
    features, targets = torch.from_numpy(x), torch.from_numpy(y)
    one, each = torch.tensor([5.0]), torch.linspace(0.5, 8.0, 6)
    given = {"X": x.tolist(), "y": y.tolist(), "one": 5.0, "each": each.tolist()}
    ran = subprocess.run(
        [sys.executable, "-c", _JAXOPT],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    theirs = {name: torch.tensor(value) for name, value in json.loads(ran.stdout).items()}

    def objective(w, penalty):
        return (features @ w - targets).square().mean() + 0.5 * (penalty * w.square()).sum()

    def jacobian(at, method):
        penalty = at.clone().requires_grad_()
        w = torch.linalg.solve(2 * features.T @ features / 40 + torch.diag(at.expand(6)), 2 * features.T @ targets / 40)
        response = mlo.best_response(objective, w, penalty, method)
        return torch.stack([torch.autograd.grad(r, penalty, retain_graph=True)[0] for r in response])

    method = mlo.ConjugateGradient(rtol=1e-14)
    assert error(jacobian(one, method)[:, 0], theirs["one"]) < 1e-11
    assert error(jacobian(each, method), theirs["each"]) < 1e-11
    for steps, truncated in enumerate(theirs["truncated"], start=1):
        assert error(jacobian(each, mlo.ConjugateGradient(max_steps=steps, rtol=0.0)), truncated) < SAME
        assert error(truncated, theirs["each"]) > 1e-6


# --- Fixed points by plain loops, as in hypertorch ----------------------------------------------------------------


def fixed_point_map(problem, scale):
    """Φ(w, x) = w − scale ∂L/∂w, of which the solution is the fixed point."""

    def step(w, x):
        gradients = torch.autograd.grad(problem.loss(w, x), w, create_graph=True)
        return tuple(t - scale * g for t, g in zip(w, gradients, strict=True))

    return step


@pytest.mark.parametrize("terms", [1, 2, 7, 30])
def test_fixed_point_iteration(problem, terms):
    """v ← (∂Φ/∂w)ᵀ v + c from v = 0: the partial sums of a Neumann series."""
    scale = 1 / largest_eigenvalue(problem)
    w = tuple(t.clone().requires_grad_() for t in problem.solution)
    x = problem.at.clone().requires_grad_()
    mapped = fixed_point_map(problem, scale)(w, x)
    direct, *cotangents = torch.autograd.grad(problem.upper(w, x), (x, *w))
    v = [torch.zeros_like(t) for t in w]
    for _ in range(terms):
        back = torch.autograd.grad(mapped, w, v, retain_graph=True)
        v = [b + c for b, c in zip(back, cotangents, strict=True)]
    theirs = direct + torch.autograd.grad(mapped, x, v)[0]
    assert error(by_mlo(problem, mlo.Neumann(terms=terms, scale=scale, rtol=0.0)), theirs) < 1e-12


# --- Unrolling: by a plain loop, and by higher ------------------------------------------------------------------


@dataclass
class Network:
    """A small network with weighted examples; what is differentiated through is its training."""

    steps: int = 6

    def __post_init__(self):
        self.inputs, self.targets = torch.randn(10, 3), torch.randn(10)
        self.weights = torch.randn(10)

    def build(self):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def loss(self, network, weights):
        errors = (network(self.inputs).squeeze(1) - self.targets).square()
        return (weights.sigmoid() * errors).mean()

    def upper(self, network, weights):
        return (network(self.inputs.flip(0)).squeeze(1) - self.targets).square().mean() + 0.1 * weights.square().sum()

    def by_mlo(self, optimizer, method):
        network, weights = self.build(), nn.ParameterDict({"w": self.weights.clone()})

        class Lower(mlo.Problem):
            def training_step(_, batch):
                return self.loss(_, _.deps.top.params["w"])

        class Upper(mlo.Problem):
            def training_step(_, batch):
                return self.upper(_.deps.low, _.params["w"])

        low = Lower(
            "low",
            network,
            optimizer=optimizer(network.parameters()),
            depends_on=["top"],
            steps=self.steps,
            hypergradient=method,
        )
        # Without an optimizer the upper problem stays where it is, and the lower one is solved for it.
        engine = mlo.Engine([low, Upper("top", weights, depends_on=["low"])])
        engine.step()
        return engine.hypergradient("top")["w"]

    def by_higher(self, optimizer, window=None):
        higher = pytest.importorskip("higher", reason=PEERS)
        network, weights = self.build(), self.weights.clone().requires_grad_()
        torch_optimizer = optimizer(network.parameters())
        for _ in range(self.steps - (window or self.steps)):  # before the window nothing is remembered
            torch_optimizer.zero_grad()
            self.loss(network, weights.detach()).backward()
            torch_optimizer.step()
        with higher.innerloop_ctx(network, torch_optimizer) as (functional, differentiable):
            for _ in range(window or self.steps):
                differentiable.step(self.loss(functional, weights))
            return torch.autograd.grad(self.upper(functional, weights), weights)[0]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3),
    # higher adds ε before the bias correction, torch after it: the same at ε = 0.
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.2, eps=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1),
}


# By what each of them calls it, at options that both have.
TORCHOPT = {
    "MetaSGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "MetaAdam": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.2}),
    "MetaAdamW": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2}),
    "MetaRMSProp": (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.5, "centered": True}),
    "MetaAdaGrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
}


@pytest.mark.parametrize("name", TORCHOPT)
def test_unrolled_optimizers_of_torchopt(name):
    torchopt = pytest.importorskip("torchopt", reason=PEERS)
    kind, options = TORCHOPT[name]
    case = Network()
    network, weights = case.build(), case.weights.clone().requires_grad_()
    optimizer = getattr(torchopt, name)(network, **options)
    for _ in range(case.steps):
        optimizer.step(case.loss(network, weights))
    (theirs,) = torch.autograd.grad(case.upper(network, weights), weights)
    assert error(case.by_mlo(lambda p: kind(p, **options), mlo.Unroll()), theirs) < SAME


@pytest.mark.parametrize("keep_every", [1, None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unrolled_optimizers_of_higher(name, keep_every):
    case = Network()
    theirs = case.by_higher(OPTIMIZERS[name])
    assert error(case.by_mlo(OPTIMIZERS[name], mlo.Unroll(keep_every=keep_every)), theirs) < SAME


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
def test_truncated_unrolled_optimizers_of_higher(name):
    case = Network()
    theirs = case.by_higher(OPTIMIZERS[name], window=2)
    assert error(case.by_mlo(OPTIMIZERS[name], mlo.Unroll(steps=2)), theirs) < SAME
    assert error(theirs, case.by_higher(OPTIMIZERS[name])) > 1e-3


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_unrolled_gradient_descent_by_a_plain_loop(problem, steps):
    scale = 1 / largest_eigenvalue(problem)
    step = fixed_point_map(problem, scale)
    x = problem.at.clone().requires_grad_()
    w = tuple(torch.zeros_like(t).requires_grad_() for t in problem.solution)
    for _ in range(steps):
        w = step(w, x)
    (theirs,) = torch.autograd.grad(problem.upper(w, x), x)

    class Lower(mlo.Problem):
        def training_step(self, batch):
            return problem.loss(tuple(self.params.values()), self.deps.top.params["x"])

    class Upper(mlo.Problem):
        def training_step(self, batch):
            return problem.upper(tuple(self.deps.low.params.values()), self.params["x"])

    start = nn.ParameterDict({"a": torch.zeros(2, 3), "b": torch.zeros(6)})
    upper = nn.ParameterDict({"x": problem.at.clone()})
    low = Lower(
        "low",
        start,
        optimizer=torch.optim.SGD(start.parameters(), lr=scale),
        depends_on=["top"],
        steps=steps,
        hypergradient=mlo.Unroll(),
    )
    engine = mlo.Engine([low, Upper("top", upper, depends_on=["low"])])
    engine.step()
    assert error(engine.hypergradient("top")["x"], theirs) < 1e-12
