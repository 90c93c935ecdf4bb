"""What a hypergradient costs: one solve per stage whatever the number of paths, published counts when nested."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

import mlo
from tests import zoo
from tests.test_hypergradient_nested import joined, non_quadratic_levels


@dataclass(frozen=True)
class Counted(mlo.ConjugateGradient):
    """Conjugate gradients that note every solve."""

    log: list = field(default_factory=list, compare=False)

    def solve(self, system):
        self.log.append(system.name)
        return super().solve(system)


def evaluations(engine):
    """Count how often each problem's loss is evaluated from here on."""
    counts = dict.fromkeys(engine.problems, 0)
    for name, problem in engine.problems.items():

        def counted(batch, *, name=name, step=problem.training_step):
            counts[name] += 1
            return step(batch)

        problem.training_step = counted
    return counts


@pytest.mark.parametrize(("topology", "options"), [("chain", {"length": 6}), ("diamond", {}), ("dense", {"length": 7})])
def test_one_solve_and_one_evaluation_per_stage(topology, options):
    method = Counted()
    stages, top = zoo.TOPOLOGIES[topology](method, **options)
    engine = mlo.Engine([*stages, top])
    counts = evaluations(engine)
    engine.hypergradient("top")
    assert sorted(method.log) == sorted(f"top/{s.name}" for s in stages)
    assert counts == dict.fromkeys(engine.problems, 1)


@pytest.mark.parametrize("length", [2, 5, 9])
def test_a_finite_difference_costs_two_evaluations_per_stage(length):
    stages, top = zoo.dense(mlo.FiniteDifference(), length=length)
    engine = mlo.Engine([*stages, top])
    counts = evaluations(engine)
    engine.hypergradient("top")
    assert counts == {**{s.name: 2 for s in stages}, "top": 1}


def test_sides_that_differ_much_are_compared_at_steps_1_2_4_and_8():
    """A shift so long that the loss is another one on each side, as it is at every step."""
    stages, top = zoo.two_levels(mlo.FiniteDifference(epsilon=5.0))
    engine = mlo.Engine([*stages, top])
    counts, each = evaluations(engine), []
    for _ in range(9):
        before = counts["w"]
        engine.step()
        each.append(counts["w"] - before)
    # Its own step, and the two sides; at the second solve the order of derivatives is compared (two more), and the loss
    # of weights that need a gradient with that of others (two more).
    expected = [4, 4, 3, 4, 3, 3, 3, 4, 3]
    assert [count - (4 if step == 1 else 0) for step, count in enumerate(each)] == expected


def test_a_training_step_costs_no_more_than_its_hypergradient():
    stages, top = zoo.dense(mlo.ConjugateGradient(), length=4)
    engine = mlo.Engine([*stages, top])
    counts = evaluations(engine)
    reports = engine.step()
    assert counts == {**{s.name: 2 for s in stages}, "top": 1}  # its own step, and its node
    assert {path: s.solves for path, s in reports["top"].solves.items()} == {f"top/{s.name}": 1 for s in stages}
    assert all(not reports[s.name].solves for s in stages)


def test_accumulated_batches_are_solved_for_once():
    method = Counted()
    stages, top = zoo.chain(method, length=3)
    top.accumulate = 4
    engine = mlo.Engine([*stages, top])
    engine.step()
    assert sorted(method.log) == ["top/w1", "top/w2", "top/w3"]


def test_conjugate_gradients_need_at_most_as_many_products_as_unknowns():
    stages, top = zoo.two_levels(mlo.ConjugateGradient())
    reports = mlo.Engine([*stages, top]).step()
    summary = reports["top"].solves["top/w"]
    assert 1 < summary.products <= 6
    assert summary.statuses == {mlo.Status.CONVERGED: 1}
    assert summary.worst_residual < 1e-10


@pytest.mark.parametrize(("method", "products"), [(mlo.Neumann(5, 0.1), 4), (mlo.Identity(), 0), (mlo.Dense(), 6)])
def test_products_of_the_other_methods(method, products):
    stages, top = zoo.two_levels(method)
    reports = mlo.Engine([*stages, top]).step()
    assert reports["top"].solves["top/w"].products == products


def test_nested_levels_publish_their_counts():
    """Dense solves make the counts exact: N products per solve, and two inner solves per outer product."""
    n = 3
    levels = non_quadratic_levels(3, mlo.Dense())
    engine = mlo.Engine(levels)
    reports = engine.step()
    top = {path: (s.solves, s.products) for path, s in reports["t1"].solves.items()}
    # t2's gradient needs one inner solve; each of its n products, and the mixed product at the end, two more: one
    # for the changed cotangent, one for the changed inverse.
    inner = 1 + 2 * (n + 1)
    assert top == {"t1/t2": (1, n), "t1/t3": (1, n), "t1/t2/t3": (inner, inner * n)}
    assert {path: s.solves for path, s in reports["t2"].solves.items()} == {"t2/t3": 1}
    assert not reports["t3"].solves


def test_a_warm_start_saves_products_and_not_accuracy():
    results = {}
    for warm in (False, True):
        torch.manual_seed(0)
        hessian = zoo.spd(60, shift=0.05)
        top = zoo.Target(reads=["w"])
        method = mlo.ConjugateGradient(rtol=1e-6, warm_start=warm)
        stage = zoo.Quadratic("w", n=60, reads=["top"], size_of={"top": 6}, hessian=hessian, hypergradient=method)
        top.targets["w"], top.mixed["w"] = torch.randn(60), torch.randn(6, 60)
        for group in (*stage.optimizer.param_groups, *top.optimizer.param_groups):
            group["lr"] = 1e-5  # the systems of two steps are nearly the same
        engine = mlo.Engine([stage, top])
        products = [engine.step()["top"].solves["top/w"].products for _ in range(4)]
        results[warm] = products, zoo.by_engine(engine, top)
    (cold, a), (warm, b) = results[False], results[True]
    assert warm[0] == cold[0]
    assert all(w < c for w, c in zip(warm[1:], cold[1:], strict=True))
    assert zoo.relative_error(a, b) < 1e-5


def test_hypergradients_do_not_warm_the_start_of_the_next_step():
    stages, top = zoo.two_levels(mlo.ConjugateGradient(warm_start=True))
    engine = mlo.Engine([*stages, top])
    engine.hypergradient("top")
    products = engine.step()["top"].solves["top/w"].products
    torch.manual_seed(0)
    stages, top = zoo.two_levels(mlo.ConjugateGradient(warm_start=True))
    assert mlo.Engine([*stages, top]).step()["top"].solves["top/w"].products == products


def test_warm_starts_of_nested_levels_do_not_change_the_result():
    gradients = []
    cold = non_quadratic_levels(3, mlo.ConjugateGradient(rtol=1e-9))
    warm = non_quadratic_levels(3, mlo.ConjugateGradient(rtol=1e-9, warm_start=True))
    for levels in (cold, warm):
        torch.manual_seed(1)
        for level, twin in zip(levels, cold, strict=True):
            level.function = twin.function
            for p in level.module.parameters():
                torch.nn.init.normal_(p)
        engine = mlo.Engine(levels)
        engine.run(3)
        gradients.append(joined(engine.hypergradient("t1")))
    assert zoo.relative_error(gradients[1], gradients[0]) < 1e-6
