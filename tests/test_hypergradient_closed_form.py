"""Every method in every graph without true nesting, against plain linear algebra in float64."""

from __future__ import annotations

import pytest
import torch

import mlo
from tests import zoo


def neumann_inverse(terms, scale):
    def inverse(stage):
        step = torch.eye(stage.n) - scale * stage.hessian
        return scale * sum(torch.linalg.matrix_power(step, k) for k in range(terms))

    return inverse


def largest_eigenvalue(stages):
    return max(torch.linalg.eigvalsh(s.hessian)[-1].item() for s in stages)


@pytest.mark.parametrize("topology", zoo.TOPOLOGIES)
@pytest.mark.parametrize("method", [mlo.ConjugateGradient(rtol=1e-12), mlo.Dense(), mlo.ConjugateGradient()])
def test_exact_methods(topology, method):
    stages, top = zoo.TOPOLOGIES[topology](method)
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top)
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-8


@pytest.mark.parametrize("topology", zoo.TOPOLOGIES)
def test_converged_neumann(topology):
    stages, top = zoo.TOPOLOGIES[topology](mlo.Neumann(terms=1000, scale=0.2))
    assert largest_eigenvalue(stages) < 2 / 0.2
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top)
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-6


@pytest.mark.parametrize("topology", zoo.TOPOLOGIES)
@pytest.mark.parametrize(
    ("method", "inverse"),
    [
        (mlo.Neumann(terms=1, scale=0.15), neumann_inverse(1, 0.15)),
        (mlo.Neumann(terms=7, scale=0.15), neumann_inverse(7, 0.15)),
        (mlo.Neumann(terms=3), neumann_inverse(3, 0.1)),
        (mlo.Identity(), lambda s: torch.eye(s.n)),
        (mlo.Identity(scale=0.3), lambda s: 0.3 * torch.eye(s.n)),
        (mlo.Identity(scale=None), lambda s: 0.1 * torch.eye(s.n)),
        (mlo.StopGradient(), lambda s: torch.zeros(s.n, s.n)),
        (mlo.ConjugateGradient(damping=0.7), lambda s: torch.linalg.inv(s.hessian + 0.7 * torch.eye(s.n))),
    ],
)
def test_methods_with_a_formula_of_their_own(topology, method, inverse):
    stages, top = zoo.TOPOLOGIES[topology](method)
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top, inverse)
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-9


@pytest.mark.parametrize("topology", zoo.TOPOLOGIES)
@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (mlo.FiniteDifference(), 0.1),
        (mlo.FiniteDifference(scale=0.4), 0.4),
        (mlo.FiniteDifference(scale=0.4, epsilon=1e-2), 0.4),
    ],
)
def test_finite_difference_is_exact_for_its_formula_on_quadratics(topology, method, scale):
    stages, top = zoo.TOPOLOGIES[topology](method)
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top, lambda s: scale * torch.eye(s.n))
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-8


@pytest.mark.parametrize("method", [mlo.FiniteDifference(), mlo.Identity(scale=None), mlo.Neumann(terms=1)])
def test_scale_is_the_learning_rate_of_each_parameter_group(method):
    top = zoo.Target(reads=["w"])
    stage = zoo.Quadratic("w", reads=["top"], hypergradient=method)
    m = stage.module
    groups = [{"params": [m.scalar], "lr": 0.5}, {"params": [m.rest], "lr": 0.02}]
    stage.optimizer = torch.optim.SGD([*groups, {"params": [m.inner["deep"][0], m.unused]}], lr=0.3)
    engine = mlo.Engine([stage, top])
    rates = torch.cat([torch.tensor([0.5]), torch.full((3,), 0.02), torch.full((2,), 0.3)])
    expected = zoo.exact_hypergradient([stage], top, lambda s: torch.diag(rates))
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-8
    # The rates are those of the moment, as a scheduler leaves them.
    stage.optimizer.param_groups[1]["lr"] = 0.04
    rates[1:4] = 0.04
    expected = zoo.exact_hypergradient([stage], top, lambda s: torch.diag(rates))
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-8
    stage.optimizer.load_state_dict(stage.optimizer.state_dict())  # makes new group dictionaries
    stage.optimizer.param_groups[0]["lr"] = rates[0] = 0.7
    expected = zoo.exact_hypergradient([stage], top, lambda s: torch.diag(rates))
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-8


@pytest.mark.parametrize("c", [1.0, 2.0, 1e-3, 1e4])
@pytest.mark.parametrize(
    "method",
    [
        mlo.ConjugateGradient(),
        mlo.ConjugateGradient(rtol=0.0),
        mlo.ConjugateGradient(max_steps=1),
        mlo.Dense(),
        mlo.Neumann(terms=3000, scale=1e-4),
        mlo.Identity(scale=1e-4),
    ],
)
def test_multiples_of_the_identity(c, method):
    if isinstance(method, mlo.Neumann | mlo.Identity):
        c = 1e4  # what their scale is made for
    stages, top = zoo.chain(method, length=2, hessian=c * torch.eye(6))
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top)
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-12


def test_repeated_eigenvalues_end_conjugate_gradients_early():
    q = torch.linalg.qr(torch.randn(6, 6)).Q
    hessian = q @ torch.diag(torch.tensor([1.0, 1, 1, 5, 5, 5])) @ q.T
    stages, top = zoo.two_levels(mlo.ConjugateGradient(max_steps=2, on_breakdown="raise"), hessian=hessian)
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top)
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-10


def test_methods_mix_in_one_graph():
    methods = [mlo.ConjugateGradient(), mlo.FiniteDifference(), mlo.Neumann(4, 0.2), mlo.Identity(0.3), mlo.Dense()]
    inverses = {
        "w1": lambda s: torch.linalg.inv(s.hessian),
        "w2": lambda s: 0.1 * torch.eye(s.n),
        "w3": neumann_inverse(4, 0.2),
        "w4": lambda s: 0.3 * torch.eye(s.n),
        "w5": lambda s: torch.linalg.inv(s.hessian),
    }
    stages, top = zoo.dense(None)
    for stage, method in zip(stages, methods, strict=True):
        stage.hypergradient = method
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top, lambda s: inverses[s.name](s))
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-8


def test_dense_solves_indefinite_stages():
    hessian = zoo.spd(6) - 2.5 * torch.eye(6)
    assert torch.linalg.eigvalsh(hessian)[0] < 0 < torch.linalg.eigvalsh(hessian)[-1]
    stages, top = zoo.chain(mlo.Dense(), length=2, hessian=hessian)
    engine = mlo.Engine([*stages, top])
    expected = zoo.exact_hypergradient(stages, top)
    assert zoo.relative_error(zoo.by_engine(engine, top), expected) < 1e-9


def test_hypergradient_of_a_middle_problem_takes_the_upper_ones_as_given():
    # The gradient of a stage's own loss at its solution vanishes; moved away it is A θ − b.
    stages, top = zoo.chain(mlo.ConjugateGradient(), length=2)
    engine = mlo.Engine([*stages, top])
    values = zoo.solve_in_order(stages, top)
    assert zoo.flat(engine.hypergradient("w2")).norm() < 1e-12
    moved = values["w2"] + 1.0
    zoo.assign(stages[1].module, moved)
    expected = stages[1].hessian @ moved - stages[1].right_side(values)
    assert zoo.relative_error(zoo.flat(engine.hypergradient("w2")), expected) < 1e-12
