"""Every method of the library × every problem of the zoo × every product that the combination allows.

Each outcome is stated in `EXPECTED`, so that a method that begins to refuse, to break down, or to stop being exact
fails here. What is right is decided by `check_method`: up to 10·κ·ρ of the exact answer for methods that say that they
converged, and of their own formula for all others (ρ = 2e-13 in float64, 2e-6 in float32; see its docstring for central
differences). In bfloat16 the tolerance is 5 %.
"""

from __future__ import annotations

import pytest
import torch

import mlo
import mlo.testing
from mlo.hypergradient import HypergradientMethod
from mlo.products.base import Product
from mlo.testing import check_method, zoo
from mlo.testing.laws import LAWS
from mlo.testing.level import with_gradient
from mlo.testing.probe import STEPS, Probe, quiet

DOUBLE, FORWARD, DIFFERENCES = mlo.DoubleBackward(), mlo.ForwardOverReverse(), mlo.CentralDifferences()
PRODUCTS = {"double backward": DOUBLE, "forward over reverse": FORWARD, "central differences": DIFFERENCES}
RATE = zoo.ridge().learning_rate


def eye(h):
    return torch.eye(len(h), dtype=h.dtype)


def series(terms, scale):
    """Σ scale (I − scale·H)ᵏ for k < terms."""
    return lambda h: scale * sum(torch.linalg.matrix_power(eye(h) - scale * h, k) for k in range(terms))


def damped(damping):
    return lambda h: torch.linalg.inv(h + damping * eye(h))


def damped_positive_part(damping):
    """(H₊ + damping·I)⁻¹, with H₊ the symmetric H without its negative eigenvalues."""

    def inverse(h):
        values, vectors = torch.linalg.eigh((h + h.T) / 2)
        return vectors @ torch.diag(1 / (values.clamp(min=0) + damping)) @ vectors.T

    return inverse


def transposed(formula):
    """What a method gives where its products are with H in the place of Hᵀ."""
    return None if formula is None else lambda h: formula(h).T


#: For each method how it is made with a product, and the matrix that it puts in the place of H⁻¹, if it is a fixed one.
METHODS = {
    "ConjugateGradient": (lambda p: mlo.ConjugateGradient(product=p), None),
    "ConjugateGradient, damped": (lambda p: mlo.ConjugateGradient(damping=0.3, product=p), None),
    "ConjugateGradient, preconditioned": (
        lambda p: mlo.ConjugateGradient(preconditioner=mlo.Nystrom(rank=3, damping=0.1), product=p),
        None,
    ),
    "MINRES": (lambda p: mlo.MINRES(product=p), None),
    "GMRES": (lambda p: mlo.GMRES(product=p), None),
    "Dense": (lambda p: mlo.Dense(product=p), None),
    "Neumann, auto": (lambda p: mlo.Neumann(terms=200, scale="auto", rtol=1e-6, product=p), None),
    "Neumann": (lambda p: mlo.Neumann(terms=4, scale=0.15, product=p), series(4, 0.15)),
    "Nystrom": (lambda p: mlo.Nystrom(rank=20, damping=0.1, product=p), damped_positive_part(0.1)),
    "Identity": (lambda p: mlo.Identity(scale=0.3, product=p), series(1, 0.3)),
    "Identity, learning rate": (lambda p: mlo.Identity(scale=None, product=p), series(1, RATE)),
    "AdaptiveIdentity": (lambda p: mlo.AdaptiveIdentity(product=p), series(1, RATE)),
    "SOBA": (lambda p: mlo.SOBA(steps=3, product=p), series(3, RATE)),
    "Unroll": (lambda p: mlo.Unroll(product=p), series(STEPS, RATE)),
    "FiniteDifference": (lambda p: mlo.FiniteDifference(scale=0.4), series(1, 0.4)),
    "F2SA": (lambda p: mlo.F2SA(steps=4), series(4, RATE)),
    "StopGradient": (lambda p: mlo.StopGradient(), lambda h: 0 * h),
}
#: Methods that have no option `product`.
WITHOUT_PRODUCT = ("FiniteDifference", "F2SA", "StopGradient")
#: Right to first order in 1/μ only; by default ‖c‖/μ is the length of a shift, which in bfloat16 is a quarter.
ONE_SIDED = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.4}

E, F, N, B, R, C = "exact", "formula", "not exact", "broke down", "refused", "not compared"
#: The kinds of problems, as `kind` tells them apart.
KINDS = ("indirect", "definite", "stiff", "ill", "worse", "indefinite", "game", "nested", "deep", "nested game")
#: In this order, with products by double backward.
EXPECTED = {
    "ConjugateGradient": (E, E, E, E, E, B, N, E, E, N),
    "ConjugateGradient, damped": (E, E, E, E, E, B, N, E, E, N),
    "ConjugateGradient, preconditioned": (E, E, E, E, E, B, N, E, E, N),
    "MINRES": (E, E, E, E, E, E, N, E, E, N),
    "GMRES": (E, E, E, E, E, E, E, E, E, E),
    "Dense": (E, E, E, E, E, E, E, E, E, E),
    "Neumann, auto": (E, E, E, N, N, B, E, E, E, E),
    "Neumann": (F, F, B, F, F, B, F, F, F, F),
    "Nystrom": (F, F, F, F, F, F, C, F, F, C),
    "Identity": (F, F, F, F, F, F, F, F, F, F),
    "Identity, learning rate": (F, F, F, F, F, F, F, F, F, F),
    "AdaptiveIdentity": (F, F, F, F, F, F, F, F, F, F),
    "SOBA": (F, F, B, F, F, F, F, F, N, F),
    "Unroll": (F, F, F, F, F, F, F, R, R, R),
    "FiniteDifference": (F, F, F, F, F, F, F, R, R, R),
    "F2SA": (F, F, B, F, F, F, F, R, R, R),
    "StopGradient": (R, F, F, F, F, F, F, F, F, F),
}
REASONS = {
    "StopGradient": "a tensor without a graph",
    "nested": "its own loss reads the response of|needs a derivative of this method",
}
BREAKDOWNS = {
    "ConjugateGradient": "NEGATIVE_CURVATURE",
    "MINRES": "SINGULAR",  # in bfloat16, at a system that is not symmetric
    "Neumann": "DIVERGED",
    "SOBA": "DIVERGED",
    "F2SA": "DIVERGED",
}


def kind(problem):
    if "nested" in problem.tags:
        return "nested game" if "symmetric" not in problem.tags else "deep" if "deep" in problem.tags else "nested"
    if "ill_conditioned" in problem.tags:
        return "ill" if problem.condition < 1e3 else "worse"
    if "symmetric" not in problem.tags:
        return "game"
    if "definite" not in problem.tags:
        return "indefinite"
    if problem.name in ("ridge", "logistic"):
        return "indirect"
    return "stiff" if problem.name == "multiple_of_identity(10000)" else "definite"


def combined(names):
    return [
        pytest.param(name, product, id=f"{name}-{title}")
        for name in names
        for title, product in PRODUCTS.items()
        if product is DOUBLE or not (name in WITHOUT_PRODUCT or ", " in name)  # an option is tried with one product
    ]


COMBINATIONS = combined(METHODS)


def outcome(name, product, column):
    """What the table says, with what changes where products are directional derivatives."""
    stated = EXPECTED[name][KINDS.index(column)]
    if product is DOUBLE:
        return stated
    # They cannot be differentiated, and form H·v for Hᵀv: compared with the transposed formula.
    return R if column in ("nested", "deep", "nested game") else F if (column, stated) == ("game", E) else stated


def checked(name, product, problem, dtype, rtol=None):
    """The result on one problem, by the formula that holds there."""
    make, formula = METHODS[name]
    if kind(problem) == "game" and (product is not DOUBLE or name == "F2SA"):
        exact = outcome(name, DOUBLE, "game") == E
        formula = transposed(torch.linalg.inv if exact else formula)
        rtol = rtol or (1e-5 if exact and name.startswith("Neumann") else None)
    method = make(product)
    (result,) = check_method(method, problems=[problem], formula=formula, dtype=dtype, rtol=rtol, without=LAWS).problems
    return result


def assert_reasons(name, result):
    if result.outcome == R:
        column = "StopGradient" if name == "StopGradient" else "nested"
        assert any(text in result.note for text in REASONS[column].split("|")), (name, result)
    if result.outcome == B:
        assert BREAKDOWNS[name.partition(",")[0]] in result.note, (name, result)


def test_the_table_is_complete():
    classes = {v for v in vars(mlo).values() if isinstance(v, type)}
    methods = {c for c in classes if issubclass(c, HypergradientMethod)} - {mlo.HypergradientMethod, mlo.ImplicitMethod}
    assert {type(make(DOUBLE)) for make, _ in METHODS.values()} == methods
    assert {type(p) for p in PRODUCTS.values()} == {c for c in classes if issubclass(c, Product)} - {Product}
    assert EXPECTED.keys() == METHODS.keys()
    assert {kind(p) for p in zoo.all_problems()} == set(KINDS)
    for name, (make, _) in METHODS.items():
        assert hasattr(make(DOUBLE), "product") == (name not in WITHOUT_PRODUCT), name


def test_every_docstring_has_an_equation_a_condition_a_cost_a_source_and_an_example():
    """The equation, and the condition under which it is right, stand before the options and the cost."""
    for thing in {type(make(DOUBLE)) for make, _ in METHODS.values()} | {type(p) for p in PRODUCTS.values()}:
        text = thing.__doc__
        before = text.partition("Cost: ")[0].partition("Args:")[0]
        assert any(sign in before for sign in "=≈↦←"), (thing, before)
        assert any(word in before.lower() for word in ("converge", "exact", "right", "good where")), (thing, before)
        example = text.partition(">>> import mlo, torch\n")[2].split("\n")
        assert any(line and not line.lstrip().startswith((">>>", "...")) for line in example), (thing, example)
        for needed in ("Cost: ", "Source: ", ">>> import mlo, torch\n"):
            assert needed in text, (thing, needed)
        cost = text.partition("Cost: ")[2].partition("Source: ")[0]
        assert any(word in cost for word in ("emory", "vectors", "copy")), (thing, cost)


@pytest.mark.parametrize(("name", "product"), COMBINATIONS)
def test_in_double_precision(name, product):
    found, expected = {}, {}
    for problem in zoo.all_problems():
        if "deep" in problem.tags and name == "Neumann, auto":
            continue  # thousands of products for each of its solves; four levels are run with the other series
        result = checked(name, product, problem, torch.float64, ONE_SIDED[torch.float64] if name == "F2SA" else None)
        found[problem.name], expected[problem.name] = result.outcome, outcome(name, product, kind(problem))
        assert_reasons(name, result)
        if result.outcome == N:  # else it would be right, and should say so
            assert result.error > 1e-4 or (name, kind(problem)) == ("SOBA", "deep"), result
        if result.outcome == B and METHODS[name][1] is not None and not name.startswith("Neumann"):
            assert result.error < 1e-6, result  # what it warns of is still what its formula says
    assert found == expected


@pytest.mark.parametrize("name", ["Dense", "GMRES", "Neumann", "Identity", "AdaptiveIdentity", "StopGradient"])
def test_four_levels_above_a_game(name):
    """Here the derivative of a transposed solve is taken, which a symmetric Hessian cannot tell from another order."""
    problem = zoo.nested_non_symmetric(4)
    assert checked(name, DOUBLE, problem, torch.float64).outcome == EXPECTED[name][-1]


def in_short():
    """One problem or two of each kind, of those that lower precisions can tell apart."""
    return [
        zoo.ridge(),
        zoo.logistic(),
        zoo.multiple_of_identity(1e-3),
        zoo.weight_decay(),
        zoo.chain(2, quadratic=False),
        zoo.diamond(),
        zoo.indefinite(),
        zoo.non_symmetric(),
        zoo.nested(3),
        zoo.nested_non_symmetric(),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "product"), COMBINATIONS)
def test_in_lower_precision(name, product, dtype):
    rtol = ONE_SIDED[dtype] if name == "F2SA" else 0.05 if dtype == torch.bfloat16 else None
    found, expected = {}, {}
    for problem in in_short():
        result = checked(name, product, problem, dtype, rtol)
        found[problem.name], expected[problem.name] = result.outcome, outcome(name, product, kind(problem))
        assert_reasons(name, result)
    # Methods that take an H for symmetric that is not end in one way or another, and may be right to a few per cent.
    for lost in ("non_symmetric", "nested_non_symmetric"):
        if expected[lost] in (N, C):
            assert found.pop(lost) in (N, C, B, F)
            del expected[lost]
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n in METHODS if n != "Neumann, auto"])
def test_ill_conditioned_systems_in_lower_precision_are_not_claimed_to_be_solved(name, dtype):
    for problem in (zoo.ill_conditioned(1e4), zoo.ill_conditioned(1e6)):
        result = checked(name, DOUBLE, problem, dtype, ONE_SIDED[dtype] if name == "F2SA" else None)
        assert result.ok, result


@pytest.mark.parametrize("name", [n for n in METHODS if n != "StopGradient"])
def test_a_cotangent_that_is_not_finite_is_reported_as_such(name):
    method = METHODS[name][0](DOUBLE)
    probe = Probe(method, torch.float64)

    def spoilt(own, others, _):
        return 0.5 * own[-1].square() + with_gradient(others["w"], torch.full_like(others["w"], torch.nan))

    with quiet():
        found, watch = probe.answer([probe.solved(probe.a)[0], probe.upper(probe.a, spoilt)])
    assert watch.statuses == (mlo.Status.NON_FINITE,)
    assert found.isnan().all()


# Central differences answer a cotangent of NaN by an error about the loss.
ASK_NOT = {"not finite"}
OF_OTHER_PRODUCTS = combined(["ConjugateGradient", "Identity", "Unroll"])


@pytest.mark.parametrize(
    ("name", "product"), [p for p in COMBINATIONS if p.values[1] is DOUBLE or p in OF_OTHER_PRODUCTS]
)
def test_the_laws(name, product):
    make, _ = METHODS[name]
    without = ASK_NOT if product is DIFFERENCES else ()
    report = check_method(make(product), problems=[zoo.chain(1)], without=without)
    assert report, str(report)
    kept = [r for r in report.laws if r.verdict == "ok"]
    assert len(kept) >= (8 if name == "Unroll" else 10), str(report)
