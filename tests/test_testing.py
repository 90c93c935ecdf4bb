"""`mlo.testing`: right methods pass, wrong ones are caught and named, and an engine is left as it was."""

from __future__ import annotations

import copy
import math
import random
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mlo
import mlo.testing
from mlo.testing import LBFGS, Layout, Newton, check_hypergradient, check_method, zoo
from mlo.testing.differences import derivative
from mlo.testing.laws import LAWS
from mlo.testing.reference import linearised, solved_nested
from mlo.testing.solver import Equation
from tests import levels

EXACT = mlo.ConjugateGradient()


def shallow():
    return [p for p in zoo.all_problems() if "deep" not in p.tags]


def eye(h):
    return torch.eye(len(h), dtype=h.dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- the zoo ---------------------------------------------------------------------------------------------------


def test_importing_mlo_does_not_import_its_testing():
    code = "import sys, mlo; assert not [m for m in sys.modules if m.startswith('mlo.testing')]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_zoo_covers_what_it_must():
    problems = zoo.all_problems()
    assert len({p.name for p in problems}) == len(problems)
    tags = [p.tags for p in problems]
    for tag in ("nested", "deep", "non_quadratic", "quadratic", "ill_conditioned", "symmetric", "definite"):
        assert any(tag in t for t in tags), tag
    for missing in ("symmetric", "definite"):
        assert any(missing not in t for t in tags), missing
    assert {len(p.stages) for p in problems} >= {1, 2, 3, 4, 5, 6}
    assert max(p.condition for p in problems) > 1e5
    assert repr(zoo.ridge()) == "<KnownProblem ridge: definite, quadratic, symmetric>"


def test_data_of_the_zoo_come_from_generators_of_their_own():
    state = torch.get_rng_state()
    zoo.ridge.cache_clear()
    first = zoo.ridge().gradient
    torch.manual_seed(5)
    zoo.ridge.cache_clear()
    assert torch.equal(zoo.ridge().gradient, first)
    torch.set_rng_state(state)
    zoo.ridge()
    assert torch.equal(torch.get_rng_state(), state)


def test_every_problem_stands_at_its_solution_and_nothing_else_moves_it():
    for problem in shallow():
        if "nested" in problem.tags:
            continue
        values = {level.name: level.start for level in problem.levels}
        for level in problem.levels[:-1]:
            g = level.gradient(level.start, {d: values[d] for d in level.reads})
            assert g.norm() < 1e-10 * (1 + level.start.norm()), (problem.name, level.name)


def test_tags_say_what_the_jacobians_are():
    for problem in shallow():
        for name, j in linearised(problem.levels).jacobians.items() if "nested" not in problem.tags else ():
            definite = torch.linalg.eigvalsh((j + j.T) / 2).min() > 0
            assert definite == ("definite" in problem.tags), (problem.name, name)
            assert (relative(j, j.T) < 1e-12) == ("symmetric" in problem.tags), (problem.name, name)


def test_exact_answers_agree_with_a_second_derivation():
    ridge = zoo.ridge()  # the closed form and the dense sweep
    assert relative(linearised(ridge.levels).reverse_sweep(), ridge.gradient) < 1e-13
    nested = zoo.nested_quadratic(3)  # elimination and dense recursion
    solved, gradient, condition = solved_nested(
        [replace(v, start=0 * v.start) for v in nested.levels[:-1]] + [nested.levels[-1]]
    )
    assert relative(gradient, nested.gradient) < 1e-12
    assert condition == pytest.approx(nested.condition, rel=1e-6)
    for a, b in zip(solved, nested.levels, strict=True):
        assert relative(a.start, b.start) < 1e-12
    for problem in (zoo.nested(3), zoo.nested(4), zoo.nested_quadratic(4), zoo.nested_non_symmetric(4)):
        swept = problem.with_inverse(torch.linalg.inv)  # and a third one, by custom backward rules
        for name, exact in problem.exact.items():
            assert torch.allclose(swept[name], exact, rtol=1e-10, atol=1e-12), (problem.name, name)


def test_exact_answers_come_by_the_names_of_the_upper_problem():
    problem = zoo.chain(2)
    found = problem.engine(EXACT).hypergradient(problem.upper)
    assert found.keys() == problem.exact.keys()
    assert not problem.exact["unused"].any()
    for name, exact in problem.exact.items():
        assert torch.allclose(found[name], exact, rtol=1e-8, atol=1e-12), name
    engine = problem.engine({"w1": mlo.Dense()}, layouts={"w1": Layout()}, dtype=torch.float32)
    assert isinstance(engine.graph.method("w1"), mlo.Dense)
    assert isinstance(engine.graph.method("w2"), mlo.ConjugateGradient)
    assert {p.dtype for p in engine.problems["w1"].module.parameters()} == {torch.float32}
    assert len(list(engine.problems["w1"].module.parameters())) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: zoo.chain(0),
        lambda: zoo.nested(1),
        lambda: zoo.nested_non_symmetric(2),
        lambda: zoo.nested_quadratic("3"),
        lambda: zoo.ill_conditioned(0.5),
        lambda: zoo.multiple_of_identity(0),
    ],
)
def test_the_zoo_refuses_what_it_cannot_build(wrong):
    with pytest.raises(mlo.ConfigurationError, match="expected"):
        wrong()


# --- check_method: what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [mlo.ConjugateGradient(), mlo.Dense()])
def test_the_whole_zoo_is_run_by_default(method):
    report = check_method(method)  # the tables of all methods are in test_conformance.py
    assert report, str(report)
    exact = [r for r in report.problems if r.outcome == "exact"]
    assert [r.problem for r in report.problems] == [p.name for p in zoo.all_problems()]
    assert len(exact) == (25 if isinstance(method, mlo.Dense) else 22)


def test_a_claim_that_a_low_precision_cannot_back_is_not_compared():
    report = check_method(
        mlo.Dense(), problems=[zoo.logistic(), zoo.ill_conditioned(1e6)], dtype=torch.float32, without=LAWS
    )
    assert [r.outcome for r in report.problems] == ["exact", "not compared"]
    assert "leaves room for errors up to" in report.problems[1].note


def test_tolerances_are_those_that_are_stated():
    def tolerance(method, problem, **options):
        (result,) = check_method(method, problems=[problem], without=LAWS, **options).problems
        assert result.ok
        return result.tolerance

    problem = zoo.chain(6)
    kappa = problem.condition
    by_differences = mlo.CentralDifferences()
    assert tolerance(mlo.Dense(), problem) == pytest.approx(10 * kappa * 2e-13)
    assert tolerance(mlo.Dense(), problem, dtype=torch.float32) == pytest.approx(10 * kappa * 2e-6)
    third = (2.0**-52) ** (2 / 3)
    assert tolerance(mlo.Dense(product=by_differences), problem) == pytest.approx(10 * kappa * 10 * third)
    wide = mlo.Dense(product=mlo.CentralDifferences(epsilon=1e-4))
    assert tolerance(wide, problem) == pytest.approx(10 * kappa * 1e-8)
    # The residual that a method reports is its claim.
    claimed = tolerance(mlo.Neumann(terms=200, scale=0.2, rtol=1e-6), problem)
    assert 10 * kappa * 1e-7 < claimed <= 10 * kappa * 1e-6
    # A formula magnifies errors by its own condition number, in each of the stages.
    assert tolerance(mlo.Identity(0.3), problem, formula=lambda h: 0.3 * eye(h)) == pytest.approx(10 * 6 * 2e-13)
    assert tolerance(mlo.FiniteDifference(0.3), problem, formula=lambda h: 0.3 * eye(h)) == pytest.approx(10 * 2.0**-26)


def test_outcomes_that_are_neither_right_nor_wrong():
    def outcome(method, problem):
        (result,) = check_method(method, problems=[problem], without=LAWS).problems
        return result.outcome, result.note

    assert outcome(mlo.ConjugateGradient(), zoo.indefinite()) == ("broke down", "NEGATIVE_CURVATURE")
    assert outcome(mlo.ConjugateGradient(on_breakdown="raise"), zoo.indefinite())[0] == "broke down"
    assert outcome(mlo.ConjugateGradient(max_steps=2), zoo.chain(2)) == ("not exact", "TRUNCATED")
    kind, note = outcome(mlo.FiniteDifference(), zoo.nested(3))
    assert kind == "refused"
    assert "FiniteDifference" in note
    assert outcome(mlo.StopGradient(), zoo.ridge())[0] == "refused"
    assert outcome(mlo.StopGradient(), zoo.chain(2))[0] == "no claim"
    assert outcome(mlo.ConjugateGradient(rtol=0.9), zoo.chain(2))[0] == "not compared"
    assert outcome(mlo.ConjugateGradient(damping=0.3), zoo.nested(3)) == ("exact", "CONVERGED")
    directional = outcome(mlo.Dense(product=mlo.ForwardOverReverse()), zoo.non_symmetric())
    assert directional == ("not compared", "CONVERGED, but assumes a symmetric Hessian")
    assert outcome(mlo.Unroll(), zoo.chain(2))[0] == "not exact"


def test_four_levels_are_left_out_by_default_for_a_method_that_needs_too_many_products():
    class Slow(mlo.Neumann):
        pass

    report = check_method(Slow(terms=40, scale=0.2), without=LAWS)
    left_out = [r.problem for r in report.problems if r.outcome == "left out"]
    assert left_out == ["nested_quadratic(4)", "nested(4)"]
    assert report


def test_a_report_shows_its_tables(capsys):
    report = check_method(mlo.ConjugateGradient(), problems=[zoo.ridge(), zoo.indefinite()], verbose=True)
    lines = str(report).splitlines()
    assert lines[0].startswith("ConjugateGradient(")
    assert lines[0].endswith("in float64: ok (1 exact, 1 broke down; 16 laws kept)")
    assert lines[2].split() == ["problem", "outcome", "relative", "error", "tolerance", "note"]
    assert lines[3].split()[:5] == ["ridge", "exact", "<", "1e-09", "1e-11"]
    assert "law" in lines[6]
    assert repr(report) == "<MethodCheck of ConjugateGradient: ok (1 exact, 1 broke down; 16 laws kept)>"
    assert report.raise_if_wrong() is report
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "ridge: exact, error < 1e-09. CONVERGED"
    assert printed[2] == "same twice: ok."


def test_a_method_that_is_refused_everywhere_does_not_pass():
    report = check_method(mlo.FiniteDifference(), problems=[zoo.nested(3)], without=LAWS)
    assert not report
    assert "nothing could be tested" in repr(report)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([mlo.Dense], {}),
        (["cg"], {}),
        ([mlo.Dense()], {"problems": ["ridge"]}),
        ([mlo.Dense()], {"rtol": 0}),
        ([mlo.Dense()], {"formula": 0.3}),
        ([mlo.Dense()], {"without": ["linearity"]}),
    ],
)
def test_check_method_refuses_wrong_arguments(arguments, options):
    with pytest.raises(mlo.ConfigurationError, match=r"check_method.*expected"):
        check_method(*arguments, **options)


# --- check_method: what is wrong -------------------------------------------------------------------------------


class Altered(mlo.Dense):
    """An exact solve whose result is altered, and which says all the same that it converged."""

    def solve(self, system):
        found = super().solve(system)
        return replace(found, vector=self.altered(found.vector))


class SignError(Altered):
    def altered(self, vector):
        return tuple(-t for t in vector)


class FactorTwo(Altered):
    def altered(self, vector):
        return tuple(2 * t for t in vector)


class ForgetsATensor(Altered):
    def altered(self, vector):
        return (*vector[:-1], torch.zeros_like(vector[-1]))


class NotQuite(Altered):
    def altered(self, vector):
        return tuple(t * (1 + 1e-7) for t in vector)


class Transposed(mlo.Dense):
    """Solves with H in the place of Hᵀ."""

    def solve(self, system):
        columns = []
        units = torch.eye(sum(t.numel() for t in system.rhs))
        for unit in units:
            parts = torch.split(unit, [t.numel() for t in system.rhs])
            product = system.product([p.reshape(t.shape) for p, t in zip(parts, system.rhs, strict=True)])
            columns.append(torch.cat([t.reshape(-1) for t in product]))
        joined = torch.linalg.solve(torch.stack(columns), torch.cat([t.reshape(-1) for t in system.rhs]))
        parts = torch.split(joined, [t.numel() for t in system.rhs])
        vector = tuple(p.reshape(t.shape) for p, t in zip(parts, system.rhs, strict=True))
        return mlo.Solution(vector, mlo.Status.CONVERGED, 1, 0.0)


class ClaimsTooMuch(mlo.ConjugateGradient):
    """Stops early, and says that it converged."""

    def solve(self, system):
        found = mlo.ConjugateGradient(max_steps=3).solve(system)
        return replace(found, status=mlo.Status.CONVERGED, relative_residual=1e-12)


class AlwaysConverged(mlo.Dense):
    """Right where there is a right answer, and never anything but sure."""

    def solve(self, system):
        return replace(super().solve(system), status=mlo.Status.CONVERGED, relative_residual=0.0)


class WrongScale(mlo.Identity):
    """Applies its scale twice."""

    def solve(self, system):
        found = super().solve(system)
        return replace(found, vector=tuple(self.scale * t for t in found.vector))


class PointsAway(mlo.Identity):
    def solve(self, system):
        found = super().solve(system)
        return replace(found, vector=tuple(-1e-3 * t for t in found.vector))


class OneLearningRate(mlo.Identity):
    """Takes the first group's learning rate for all."""

    def solve(self, system):
        return mlo.Solution(tuple(system.learning_rates[0] * t for t in system.rhs), mlo.Status.APPROXIMATE, 0, None)


class PerTensor(mlo.Identity):
    """Shrinks the answer by the number of tensors."""

    def solve(self, system):
        return mlo.Solution(tuple(t / len(system.rhs) for t in system.rhs), mlo.Status.APPROXIMATE, 0, None)


class FirstOnly(mlo.Identity):
    """Sees the first tensor only, by its position."""

    def solve(self, system):
        first, *rest = system.rhs
        return mlo.Solution((first, *(0.5 * t for t in rest)), mlo.Status.APPROXIMATE, 0, None)


class Normalised(mlo.Identity):
    """Forgets the length of the cotangent."""

    def solve(self, system):
        size = math.sqrt(sum(t.square().sum().item() for t in system.rhs))
        return mlo.Solution(tuple(t / size for t in system.rhs), mlo.Status.APPROXIMATE, 0, None)


class Squared(mlo.Identity):
    """Homogeneous, and not additive."""

    def solve(self, system):
        size = math.sqrt(sum(t.square().sum().item() for t in system.rhs)) or 1.0
        return mlo.Solution(tuple(t * t.abs() / size for t in system.rhs), mlo.Status.APPROXIMATE, 0, None)


class Writes(mlo.Identity):
    """Shifts the parameters, and does not shift them back to the last bit."""

    def pullback(self, stage, cotangents, solution, inputs, needed):
        solution[0].data.mul_(1 + 1e-9)
        return super().pullback(stage, cotangents, solution, inputs, needed)


class LeavesGradients(mlo.Identity):
    def pullback(self, stage, cotangents, solution, inputs, needed):
        member = stage._member
        member.trainable[0].grad = torch.zeros_like(member.trainable[0])
        return super().pullback(stage, cotangents, solution, inputs, needed)


class Draws(mlo.Identity):
    """Draws from Python's global generator; the engine keeps torch's from what methods draw."""

    def pullback(self, stage, cotangents, solution, inputs, needed):
        random.random()
        return super().pullback(stage, cotangents, solution, inputs, needed)


@dataclass(frozen=True)
class Noisy(mlo.Identity):
    """Answers with noise from a generator of its own."""

    generator: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def solve(self, system):
        noise = 1 + 0.1 * torch.rand((), generator=self.generator)
        return mlo.Solution(tuple(noise * t for t in system.rhs), mlo.Status.APPROXIMATE, 0, None)


class IgnoresTheOptimizer(mlo.Dense):
    """Takes the loss for all there is: no decay, no sign."""

    def pullback(self, stage, cotangents, solution, inputs, needed):
        twin = copy.copy(stage)
        plain = {"weight_decays": (0.0,) * len(solution), "signs": (1.0,) * len(solution)}
        twin.__class__ = type("Plain", (type(stage),), plain)
        return super().pullback(twin, cotangents, solution, inputs, needed)


class IgnoresTheSign(mlo.Identity):
    """Takes the loss for what is minimised, whatever the optimizer does with it."""

    def pullback(self, stage, cotangents, solution, inputs, needed):
        twin = copy.copy(stage)
        twin.__class__ = type("Plain", (type(stage),), {"signs": (1.0,) * len(solution)})
        return super().pullback(twin, cotangents, solution, inputs, needed)


class CountsAll(mlo.Identity):
    """Shrinks the answer by the number of all parameters of the module, whatever they are."""

    def pullback(self, stage, cotangents, solution, inputs, needed):
        count = len(stage._member.parameters)
        return super().pullback(stage, [c / count for c in cotangents], solution, inputs, needed)


class Stubborn(mlo.ConjugateGradient):
    """Keeps what it found first for ever."""

    keeps_solutions = True

    def solve(self, system):
        found = super().solve(system)
        if system.last_solution is None:
            return found
        return replace(found, vector=system.last_solution, relative_residual=0.0)


class Lists(mlo.HypergradientMethod):
    """Returns tensors of another shape."""

    def pullback(self, stage, cotangents, solution, inputs, needed):
        raise IndexError("list index out of range")


CAUGHT = [
    (SignError(), ["ridge", "chain(6)", "nested(3)", "honest residual"]),
    (FactorTwo(), ["ridge", "chain(6)", "nested(3)", "honest residual"]),
    (NotQuite(), ["ridge", "chain(6)", "nested(3)"]),
    (ForgetsATensor(), ["chain(6)", "diamond", "permutation", "splitting", "honest residual"]),
    (Transposed(), ["non_symmetric", "nested_non_symmetric"]),
    (ClaimsTooMuch(), ["ridge", "chain(6)", "honest residual", "singular"]),
    (AlwaysConverged(), ["singular", "not finite"]),
    (WrongScale(scale=0.25), ["H = c·I"]),
    (PointsAway(), ["H = c·I"]),
    (OneLearningRate(scale=None), ["parameter groups"]),
    (PerTensor(), ["splitting"]),
    (FirstOnly(), ["permutation", "splitting"]),
    (Normalised(), ["homogeneous", "zero"]),
    (Squared(), ["additive"]),
    (Writes(), ["changes nothing", "leaves steps alone"]),
    (LeavesGradients(), ["changes nothing"]),
    (Draws(), ["leaves steps alone"]),
    (Noisy(), ["same twice"]),
    (IgnoresTheOptimizer(), ["weight_decay", "weight decay"]),
    (IgnoresTheSign(), ["maximise"]),
    (CountsAll(), ["unused parameters", "frozen parameters"]),
    (Stubborn(), ["warm start"]),
    (Lists(), ["ridge", "same twice"]),
]


@pytest.mark.parametrize(
    ("method", "failures"), CAUGHT, ids=lambda x: type(x).__name__ if not isinstance(x, list) else ""
)
def test_a_wrong_method_is_caught_and_what_it_breaks_is_named(method, failures):
    problems = [zoo.ridge(), zoo.non_symmetric(), zoo.weight_decay(), zoo.chain(6), zoo.diamond()]
    if isinstance(method, mlo.Dense):
        problems += [zoo.nested(3), zoo.nested_non_symmetric()]
    report = check_method(method, problems=problems)
    assert not report
    assert set(failures) <= set(report.failures), str(report)
    with pytest.raises(mlo.testing.CheckError, match=failures[0].replace("(", r"\(").replace(")", r"\)")):
        report.raise_if_wrong()


def test_every_law_is_broken_by_some_method():
    assert {failure for _, failures in CAUGHT for failure in failures} >= set(LAWS)


def test_only_what_is_wrong_is_named():
    report = check_method(
        Transposed(), problems=[zoo.chain(2), zoo.nested(3), zoo.non_symmetric(), zoo.nested_non_symmetric()]
    )
    assert report.failures == ("non_symmetric", "nested_non_symmetric", "singular", "not finite")
    assert check_method(WrongScale(scale=0.25), problems=[zoo.chain(2)]).failures == ("H = c·I",)
    assert check_method(Draws(), problems=[zoo.chain(2)]).failures == ("leaves steps alone",)
    assert "RAISED" in str(check_method(Lists(), problems=[zoo.chain(2)]))
    assert "IndexError: list index out of range" in str(check_method(Lists(), problems=[zoo.chain(2)]))


def test_a_formula_and_a_tolerance_of_ones_own_are_compared():
    wrong = check_method(mlo.Identity(scale=0.3), formula=lambda h: 0.31 * eye(h), problems=[zoo.chain(2)])
    assert wrong.failures == ("chain(2)",)
    loose = mlo.ConjugateGradient(rtol=1e-3)
    assert check_method(loose, problems=[zoo.chain(6)], without=LAWS)
    assert not check_method(loose, rtol=1e-9, problems=[zoo.chain(6)], without=LAWS)
    assert not check_method(NotQuite(), problems=[zoo.ridge()], without=LAWS)
    assert check_method(NotQuite(), rtol=1e-6, problems=[zoo.ridge()], without=LAWS)


def test_check_method_leaves_the_method_and_the_generators_alone():
    method = mlo.ConjugateGradient()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    check_method(method, problems=[zoo.chain(2)])
    check_method(Draws(), problems=[zoo.chain(2)])
    assert type(method) is mlo.ConjugateGradient
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


# --- check_hypergradient: what is right ------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(shallow())), ids=[p.name for p in shallow()])
def test_right_graphs_pass(index):
    problem = shallow()[index]
    # Both sides are known to the square of the condition number times the rounding unit.
    rtol = max(1e-7, 2e-15 * problem.condition**2)
    directions = 1 if "nested" in problem.tags else 2
    check = check_hypergradient(problem.engine(mlo.Dense()), problem.upper, directions=directions, rtol=rtol)
    assert check, str(check)
    assert check.wrong == ()
    assert {line.name for line in check.stages} == set(problem.stages)
    assert all(line.method == "Dense" and line.statuses == (mlo.Status.CONVERGED,) for line in check.stages)


def test_iterative_methods_pass_too():
    problem = zoo.diamond()
    methods = {
        "base": mlo.Neumann(terms=200, scale=0.3),
        "left": mlo.ConjugateGradient(product=mlo.CentralDifferences()),
        "right": mlo.ConjugateGradient(product=mlo.ForwardOverReverse()),
    }
    check = check_hypergradient(problem.engine(methods), problem.upper)
    assert check, str(check)
    assert [line.method for line in check.stages] == ["Neumann", *3 * ["ConjugateGradient"]]


@pytest.mark.parametrize("seed", range(3))
def test_other_directions_and_steps(seed):
    problem = zoo.chain(2, quadratic=False)
    engine = problem.engine(EXACT)
    names = list(engine.problems["top"].params)[:3]
    assert check_hypergradient(engine, "top", directions=1, seed=seed, step=10.0**-seed)
    check = check_hypergradient(engine, "top", directions=1, seed=seed, parameters=["piece_0", "piece_2"])
    assert [line.name for line in check.parameters] == ["total, parameter 'piece_0'", "total, parameter 'piece_2'"]
    assert check, (names, str(check))


def test_any_problem_of_a_graph_can_be_checked():
    problem = zoo.dense_graph(3)
    engine = problem.engine(EXACT)
    for name, stages in (("w1", ()), ("w2", ()), ("w3", ()), ("top", ("w1", "w2", "w3"))):
        check = check_hypergradient(engine, name, directions=1)
        assert check, str(check)
        assert tuple(line.name for line in check.stages) == stages
    # A middle level of a nested graph: its hypergradient flows through the level below it.
    nested = zoo.nested(3)
    check = check_hypergradient(nested.engine(EXACT), "t2", directions=1)
    assert check, str(check)
    assert [line.name for line in check.stages] == ["t3"]


def test_stages_need_not_be_solved_before():
    problem = zoo.chain(2, quadratic=False)
    engine = problem.engine(EXACT)
    with torch.no_grad():
        for name in problem.stages:
            for p in engine.problems[name].module.parameters():
                p.add_(torch.randn_like(p))
    assert check_hypergradient(engine, "top", directions=1)


# --- check_hypergradient: what is wrong ------------------------------------------------------------------------

WRONG = [
    (zoo.chain(4), "w1", mlo.StopGradient()),
    (zoo.chain(4), "w3", mlo.Identity(scale=0.4)),
    (zoo.chain(4), "w4", SignError()),
    (zoo.diamond(), "base", FactorTwo()),
    (zoo.diamond(), "left", mlo.StopGradient()),
    (zoo.diamond(), "right", ForgetsATensor()),
    (zoo.diamond(), "join", mlo.Identity()),
    (zoo.nested(3), "t3", mlo.Identity(0.5)),
    (zoo.nested(3), "t2", mlo.StopGradient()),
    (zoo.nested_non_symmetric(), "t3", Transposed()),
    (zoo.logistic(), "w", mlo.ConjugateGradient(max_steps=1)),
]


@pytest.mark.parametrize(("problem", "stage", "method"), WRONG)
def test_the_wrong_stage_is_named(problem, stage, method):
    engine = problem.engine({**dict.fromkeys(problem.stages, mlo.Dense()), stage: method})
    check = check_hypergradient(engine, problem.upper, directions=1 if "nested" in problem.tags else 2)
    assert not check
    assert check.wrong == (stage,)
    assert check.worst.name == stage
    assert check.worst.verdict == "WRONG"
    assert not check.total.ok
    assert f"WRONG at stage '{stage}'" in repr(check)
    assert len(repr(check)) < 200
    with pytest.raises(mlo.testing.CheckError, match=f"WRONG at stage '{stage}'"):
        check.raise_if_wrong()
    with pytest.raises(AssertionError):
        assert check


def test_the_report_is_a_table_with_a_remedy():
    problem = zoo.chain(2)
    engine = problem.engine({"w1": mlo.ConjugateGradient(), "w2": mlo.Neumann(terms=3, scale=0.1)})
    lines = str(check_hypergradient(engine, "top")).splitlines()
    assert lines[0].startswith("hypergradient of 'top': WRONG at stage 'w2' (relative error ")
    assert lines[1].split() == ["stage", "method", "its", "solves", "relative", "error", "verdict"]
    assert lines[2].split() == ["w1", "ConjugateGradient", "CONVERGED", "<", "1e-09", "ok"]
    assert lines[3].split()[:3] == ["w2", "Neumann", "TRUNCATED"]
    assert lines[4].split()[0] == "total"
    assert lines[5] == f"'w2': {mlo.Status.TRUNCATED.remedy}"
    stopped = problem.engine({"w2": mlo.StopGradient()})
    assert "passes no gradient" in str(check_hypergradient(stopped, "top", directions=1))
    right = check_hypergradient(problem.engine(EXACT), "top", directions=1)
    assert right.raise_if_wrong() is right
    assert repr(right) == "<HypergradientCheck of 'top': ok (largest relative error < 1e-09)>"


# --- problems of users -----------------------------------------------------------------------------------------


Problem = partial(levels.Problem, lr=0.05, momentum=0.9)


class Holder(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.values = nn.ParameterList([torch.as_tensor(v) for v in values])


def penalised(problem, batch):
    x, y = batch
    penalty = sum(p.square().sum() for p in problem.params.values())
    return F.mse_loss(problem(x).squeeze(1), y) + problem.deps.upper.params["values.0"].exp() * penalty


def validated(problem, batch):
    x, y = batch
    return F.mse_loss(problem.deps.net(x).squeeze(1), y) + 0.1 * problem.params["values.0"].square()


def network(*, method=None, data=None, upper=validated, **options):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.BatchNorm1d(3, affine=False), nn.Linear(3, 4), nn.Softplus(), nn.Dropout(0.3), nn.Linear(4, 1)
    )
    log = Holder(torch.tensor(-1.0))
    data = data or [(torch.randn(12, 3), torch.randn(12)) for _ in range(3)]
    stage = Problem(
        "net", net, penalised, data=data, depends_on=["upper"], hypergradient=method or mlo.Dense(), **options
    )
    top = Problem("upper", log, upper, data=data, depends_on=["net"])
    return mlo.Engine([stage, top])


def everything(engine):
    """All that a check must leave alone, as bits."""
    found = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]
    for name, problem in engine.problems.items():
        member = engine._members[name]
        module = problem.module
        for p in module.parameters():
            found += [
                p.detach().clone(),
                p.data_ptr(),
                p._version,
                p.requires_grad,
                None if p.grad is None else p.grad.clone(),
            ]
        found += [b.clone() for b in module.buffers()]
        found += [part.training for part in module.modules()]
        found += [copy.deepcopy(problem.optimizer.state_dict()), member.micro_batches, member.solve_micro_batches]
        found += [problem._frame, member.fresh, member.feed._iterator]
    return [*found, engine.step_count, dict(engine._warm_starts), torch.is_grad_enabled()]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"solve_batches": 2}], ids=str)
def test_networks_with_dropout_and_batch_norm_pass_and_are_left_alone(trained, options):
    engine = network(method=mlo.ConjugateGradient(warm_start=True, rtol=1e-12), **options)
    if trained:
        engine.run(trained)
    before = everything(engine)
    check = check_hypergradient(engine, "upper", directions=1, rtol=1e-5)
    assert check, str(check)
    assert same(before, everything(engine))


def test_shuffled_data_give_both_sides_the_same_batch():
    rows = torch.utils.data.TensorDataset(torch.randn(24, 3), torch.randn(24))
    engine = network(data=torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True))
    before = everything(engine)
    check = check_hypergradient(engine, "upper", directions=1, rtol=1e-5)
    assert check, str(check)
    assert same(before, everything(engine))


@pytest.mark.parametrize("fails_at", [1, 2, 5, 40, 150])
@pytest.mark.parametrize("where", ["net", "upper"])
def test_an_exception_in_a_loss_leaves_the_engine_as_it_was(where, fails_at):
    engine = network()
    engine.run(2)
    problem, count = engine.problems[where], 0
    original = problem.loss

    def failing(self, batch):
        nonlocal count
        count += 1
        torch.rand(3), np.random.rand(), random.random()
        if count == fails_at:
            raise KeyError("of the user")
        return original(self, batch)

    problem.loss = failing
    before = everything(engine)
    if where == "upper" and fails_at > 5:
        assert check_hypergradient(engine, "upper", directions=1, rtol=1e-5)
    else:
        with pytest.raises(KeyError, match="of the user"):
            check_hypergradient(engine, "upper", directions=1)
    assert same(before, everything(engine))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(context):
    engine = network()
    with context():
        check = check_hypergradient(engine, "upper", directions=1, rtol=1e-5)
        assert not torch.is_grad_enabled()
    assert check, str(check)


def test_a_check_can_be_repeated_and_training_goes_on_as_without_it():
    reports = []
    for checked in (True, False):
        engine = network()
        engine.run(2)
        if checked:
            checks = [check_hypergradient(engine, "upper", directions=1) for _ in range(2)]
            assert checks[0] == checks[1]
        reports.append(engine.run(2))
    assert reports[0] == reports[1]


def two_levels(loss, *, method=EXACT, w=(0.3, -0.2), upper=None, dtype=torch.float64, **options):
    stage = Holder(torch.tensor(w, dtype=dtype))
    top = Holder(torch.tensor([0.5, 1.0], dtype=dtype))

    def read(problem, batch):
        return problem.deps.stage.params["values.0"].pow(3).sum() + problem.params["values.0"].square().sum()

    return mlo.Engine(
        [
            Problem("stage", stage, loss, depends_on=["upper"], hypergradient=method, **options),
            Problem("upper", top, upper or read, depends_on=["stage"]),
        ]
    )


def w_and_x(problem):
    return problem.params["values.0"], problem.deps.upper.params["values.0"]


def well(problem, batch):
    w, x = w_and_x(problem)
    return torch.cosh(w).sum() + 0.5 * (w - x).square().sum() + 0.1 * w.prod() * x.sum()


def test_a_stop_gradient_that_hides_a_dependence_is_found():
    def hides(problem, batch):
        w, _ = w_and_x(problem)
        return well(problem, batch) + (w * torch.sin(w.detach())).sum()

    assert check_hypergradient(two_levels(well), "upper")
    check = check_hypergradient(two_levels(hides), "upper")
    assert check.wrong == ("stage",)
    assert "detach() or no_grad()" in str(check)


def test_activation_checkpointing_is_evaluated_where_it_is_bound():
    """In a nested graph derivatives of one loss are taken while another one is bound."""

    def checkpointed(problem, batch):
        own = problem.params["values.0"]
        others = [problem.deps[d].params["values.0"] for d in problem.depends_on]
        module = problem.module

        def body(s):
            w = module.values[0]
            return torch.cosh(w * s).sum() + w.square().sum()

        return checkpoint(body, 0.5 + 0 * own.sum(), use_reentrant=False) - sum(
            (own * torch.sin(o)).sum() for o in others
        )

    def upper(problem, batch):
        own = problem.params["values.0"]
        low, mid = (problem.deps[d].params["values.0"] for d in ("low", "mid"))
        return (low - own).square().sum() + (mid * own).sum()

    def holder():
        return Holder(torch.randn(2))

    engine = mlo.Engine(
        [
            Problem("low", holder(), checkpointed, depends_on=["mid", "top"], hypergradient=mlo.Dense()),
            Problem("mid", holder(), checkpointed, depends_on=["low", "top"], hypergradient=mlo.Dense()),
            Problem("top", holder(), upper, depends_on=["low", "mid"]),
        ]
    )
    check = check_hypergradient(engine, "top", directions=1)
    assert check, str(check)


def test_a_nested_stage_with_an_unused_parameter():
    problem = zoo.nested(3)
    layouts = {name: Layout(((), None), extras=True) for name in ("t3", "t2", "t1")}
    check = check_hypergradient(problem.engine(EXACT, layouts=layouts), "t1", directions=1)
    assert check, str(check)


def test_large_stages_are_solved_by_lbfgs():
    problem = zoo.logistic()
    engine = problem.engine(EXACT)
    with pytest.raises(mlo.ConfigurationError, match=r"Newton at stage 'w'.*at most max_size=3.*LBFGS"):
        check_hypergradient(engine, "penalties", solve=Newton(max_size=3))
    assert check_hypergradient(engine, "penalties", solve=LBFGS())
    assert check_hypergradient(engine, "penalties", solve={"w": LBFGS()})
    wrong = problem.engine(mlo.Identity())
    assert check_hypergradient(wrong, "penalties", solve=LBFGS()).wrong == ("w",)
    # What is nested inside another stage has to be differentiated.
    nested = zoo.nested_quadratic(3)
    with pytest.raises(mlo.ConfigurationError, match=r"'t3' is nested.*expected mlo.testing.Newton"):
        check_hypergradient(nested.engine(EXACT), "t1", solve=LBFGS())
    assert check_hypergradient(nested.engine(EXACT), "t2", solve=LBFGS(), directions=1)


def test_lbfgs_maximises_and_refuses_a_saddle():
    maximised = zoo.weight_decay()
    assert check_hypergradient(maximised.engine(EXACT), "top", solve=LBFGS(), directions=1)
    engine = two_levels(well)
    stage = engine.problems["stage"]
    both = Holder(*stage.params.values(), torch.tensor([0.1]))

    def saddle(problem, batch):
        return well(problem, batch) - problem.params["values.1"].square().sum() + problem.params["values.1"].sum()

    groups = [{"params": [both.values[0]]}, {"params": [both.values[1]], "maximize": True}]
    stage = Problem("stage", both, saddle, depends_on=["upper"], optimizer=torch.optim.SGD(groups, lr=0.1))
    top = engine.problems["upper"]
    engine = mlo.Engine([stage, Problem("upper", top.module, top.loss, depends_on=["stage"])])
    assert check_hypergradient(engine, "upper", directions=1)
    with pytest.raises(mlo.ConfigurationError, match="some of its parameters minimise its loss and some maximise it"):
        check_hypergradient(engine, "upper", solve=LBFGS())


def flat(problem, batch):
    w, x = w_and_x(problem)
    return (w.sum() - x.sum()).square()


def runaway(problem, batch):
    w, x = w_and_x(problem)
    return (-w).exp().sum() * x.square().sum()


@pytest.mark.parametrize(
    ("loss", "solver", "message"),
    [
        (flat, Newton(), r"stage 'stage' could not be re-solved: .*singular values.*Regularise"),
        (runaway, Newton(max_steps=20), r"stage 'stage' could not be re-solved"),
        (runaway, LBFGS(max_steps=20), r"stage 'stage' could not be re-solved: L-BFGS ended with a gradient of norm"),
        (lambda p, b: well(p, b) + torch.relu(w_and_x(p)[0]).sum(), Newton(), r"stage 'stage' could not be re-solved"),
    ],
)
def test_a_stage_that_cannot_be_solved_is_named(loss, solver, message):
    engine = two_levels(loss)
    before = everything(engine)
    with pytest.raises(mlo.testing.NotSolvedError, match=message):
        check_hypergradient(engine, "upper", solve=solver)
    assert same(before, everything(engine))


def test_single_precision_is_refused():
    engine = two_levels(well, dtype=torch.float32)
    with pytest.raises(mlo.ConfigurationError, match=r"'upper', parameter 'values.0'.*float64.*\.double\(\)"):
        check_hypergradient(engine, "upper")


def test_what_re_solving_cannot_tell_is_called_unresolved():
    engine = two_levels(well)
    check = check_hypergradient(engine, "upper", rtol=1e-16, atol=0.0, step=1e-7)
    assert not check
    assert check.worst.verdict == "UNRESOLVED"
    assert "Re-solving itself is known to a relative" in str(check)


def test_a_wrong_sum_of_right_stages_is_told_apart():
    def reads_the_parameter_itself(problem, batch):
        # The engine finds this out in evaluations 1, 2, 4, 8, …; here it is hidden behind a copy.
        return problem.deps.stage.params["values.0"].detach().pow(3).sum() + problem.params["values.0"].square().sum()

    check = check_hypergradient(two_levels(well, upper=reads_the_parameter_itself), "upper")
    assert check.wrong == ()
    assert check.worst.name == "total"
    assert "WRONG in the total" in repr(check)
    assert "Each stage's own response is right" in str(check)


def test_breakdowns_are_told_by_the_report_and_raised_by_policy():
    problem = zoo.indefinite()
    check = check_hypergradient(problem.engine(mlo.ConjugateGradient()), "top")  # no warning, which is an error here
    assert check.stages[0].statuses == (mlo.Status.NEGATIVE_CURVATURE,)
    with pytest.raises(mlo.BreakdownError):
        check_hypergradient(problem.engine(mlo.ConjugateGradient(on_breakdown="raise")), "top")


@pytest.mark.parametrize(
    "options",
    [
        {"directions": 0},
        {"step": 0.0},
        {"step": -1},
        {"rtol": 0},
        {"atol": -1.0},
        {"parameters": "piece_0"},
        {"parameters": ["weight"]},
        {"solve": {"w2": Newton()}},
        {"solve": {"w1": "newton"}},
        {"solve": "newton"},
        {"solve": Newton},
        {"seed": 0.5},
    ],
)
def test_check_hypergradient_refuses_wrong_arguments(options):
    engine = zoo.chain(1).engine(EXACT)
    with pytest.raises(mlo.ConfigurationError, match=r"check_hypergradient|solve="):
        check_hypergradient(engine, "top", **options)


def test_check_hypergradient_refuses_what_is_no_engine_or_no_problem():
    with pytest.raises(mlo.ConfigurationError, match="expected an mlo\\.Engine"):
        check_hypergradient("engine", "top")
    with pytest.raises(mlo.ConfigurationError, match="expected the name of a problem, one of w1, top"):
        check_hypergradient(zoo.chain(1).engine(EXACT), "upper")
    with pytest.raises(mlo.ConfigurationError, match="Newton"):
        Newton(max_size=0)
    with pytest.raises(mlo.ConfigurationError, match="LBFGS"):
        LBFGS(tolerance=0.0)


# --- the parts -------------------------------------------------------------------------------------------------


def test_extrapolated_differences_know_their_error():
    for function, slope in ((math.exp, 1.0), (math.sin, 1.0), (lambda t: 1e6 + t**3, 0.0), (lambda t: 3 * t, 3.0)):
        found = derivative(function, 0.1, rtol=1e-12)
        assert abs(found.value - slope) <= 3 * found.uncertainty
        assert found.uncertainty < 1e-7
    kink = derivative(lambda t: abs(t - 0.01), 0.1, rtol=1e-12)
    assert abs(kink.value + 1) <= 3 * kink.uncertainty


def test_newtons_method_finds_a_solution_from_afar():
    def residual(theta):  # one solution at (1, −2)
        u = theta - torch.tensor([1.0, -2.0])
        return u + torch.atan(5 * u) + 0.3 * u.flip(0)

    equation = Equation("stage", residual, None, torch.tensor([True, True]))
    found, _ = Newton().solve(equation, torch.tensor([30.0, 40.0]), None)
    assert torch.allclose(found, torch.tensor([1.0, -2.0]), atol=1e-12, rtol=0)
    # An entry that takes no part stays where it is.
    part = Equation("stage", lambda t: torch.stack([t[0] - 3, 0 * t[1]]), None, torch.tensor([True, False]))
    assert Newton().solve(part, torch.tensor([0.0, 7.0]), None)[0].tolist() == [3.0, 7.0]


def double_well(objective=True):
    """¼(θ² − 1)² + 0.1·θ in two dimensions: minima near ±1, saddles and a maximum near 0."""
    value = (lambda t: (0.25 * (t.square() - 1).square() + 0.1 * t).sum().item()) if objective else None
    return Equation("stage", lambda t: t**3 - t + 0.1, value, torch.tensor([True, True]))


def test_newtons_method_goes_downhill_unless_it_begins_at_a_stationary_point():
    near_the_maximum = torch.tensor([0.3, -0.3])
    assert (Newton().solve(double_well(), near_the_maximum, None)[0].abs() > 0.8).all()
    assert (Newton().solve(double_well(objective=False), near_the_maximum, None)[0].abs() < 0.2).all()
    maximum = torch.tensor([0.1010, 0.1010])
    assert torch.allclose(Newton().solve(double_well(), maximum, None)[0], maximum, atol=1e-3)
    minimum = Newton().solve(double_well(), near_the_maximum, None)[0]
    assert torch.allclose(LBFGS().solve(double_well(), minimum + 0.1, None)[0], minimum, atol=1e-10)


def test_an_untrained_network_is_solved_to_a_minimum():
    engine = network(method=mlo.ConjugateGradient(on_breakdown="raise"))
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in engine.problems["net"].module.parameters():
                p.copy_(0.3 * torch.randn_like(p))
        check = check_hypergradient(engine, "upper", directions=1, rtol=1e-5)
        assert check, str(check)
