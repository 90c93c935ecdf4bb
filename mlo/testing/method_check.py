"""`check_method`: a conformance suite that any hypergradient method can be run through."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from mlo.errors import BreakdownError, ConfigurationError, LossError
from mlo.hypergradient import HypergradientMethod, ImplicitMethod
from mlo.options import is_number
from mlo.products import CentralDifferences, ForwardOverReverse
from mlo.random_state import Preserved
from mlo.testing import zoo
from mlo.testing.errors import CheckError
from mlo.testing.flat import joined
from mlo.testing.known_problem import KnownProblem
from mlo.testing.laws import LAWS, keeps
from mlo.testing.level import engine_of
from mlo.testing.outcomes import LawResult, Outcome, ProblemResult
from mlo.testing.probe import Probe, quiet, ready, same_answer
from mlo.testing.reference import Inverse
from mlo.testing.tables import shown, table
from mlo.testing.watched import Watch, damping_of, watched

# A claim that leaves room for a larger error than this says too little to be tested.
_WEAK = 0.5
_NOTE = 60

#: What rounding alone may do to a hypergradient at a condition number of 0.1.
ROUNDING = {torch.float64: 2e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Each nested level multiplies the products of a hypergradient; from three levels with more than this four take minutes.
_TOO_MANY = 1000


@dataclass(frozen=True)
class MethodCheck:
    """What `check_method` found; true if nothing is wrong.

    Attributes:
        method: the method.
        dtype: the precision in which it was run.
        problems: one result per problem.
        laws: one result per law.

    """

    method: HypergradientMethod
    dtype: torch.dtype
    problems: tuple[ProblemResult, ...]
    laws: tuple[LawResult, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong and something was tested."""
        return not self.failures and any(r.outcome != "refused" for r in self.problems)

    @property
    def failures(self) -> tuple[str, ...]:
        """The problems and laws at which something is wrong."""
        wrong = [r.problem for r in self.problems if not r.ok]
        return (*wrong, *(r.law for r in self.laws if not r.ok))

    def __bool__(self) -> bool:
        """Whether nothing is wrong."""
        return self.ok

    def raise_if_wrong(self) -> MethodCheck:
        """Return the check itself, or raise `CheckError` with its report."""
        if not self.ok:
            raise CheckError(str(self))
        return self

    def __repr__(self) -> str:
        """Return one line."""
        return f"<MethodCheck of {type(self.method).__name__}: {self._summary()}>"

    def __str__(self) -> str:
        """Return the tables of problems and laws."""
        problems = [("problem", "outcome", "relative error", "tolerance", "note")]
        for r in self.problems:
            tolerance = "–" if r.tolerance is None else f"{r.tolerance:.0e}"
            problems.append((r.problem, r.outcome, shown(r.error), tolerance, _short(r.note, r.ok)))
        laws = [("law", "verdict", "note"), *((r.law, r.verdict, _short(r.note, r.ok)) for r in self.laws)]
        precision = str(self.dtype).removeprefix("torch.")
        head = f"{self.method} in {precision}: {self._summary()}"
        return "\n\n".join([head, *(table(rows) for rows in (problems, laws) if len(rows) > 1)])

    def _summary(self) -> str:
        if self.failures:
            return f"WRONG at {', '.join(self.failures)}"
        if not self.ok:
            return "nothing could be tested: it was refused everywhere"
        counts = Counter(r.outcome for r in self.problems)
        kept = sum(r.verdict == "ok" for r in self.laws)
        return f"ok ({', '.join(f'{n} {outcome}' for outcome, n in counts.items())}; {kept} laws kept)"


def check_method(
    method: HypergradientMethod,
    *,
    problems: Iterable[KnownProblem] | None = None,
    formula: Inverse | None = None,
    rtol: float | None = None,
    dtype: torch.dtype = torch.float64,
    without: Iterable[str] = (),
    verbose: bool = False,
) -> MethodCheck:
    """Run a method, one's own included, through every problem of the zoo and every law.

    **Problems.** The method is put at every stage. Where all its solves report `CONVERGED`, the hypergradient must be
    the exact one, up to a relative error of

        10 · κ · max(r, ρ),        κ the condition numbers of the stages added, r the largest residual reported,

    with ρ = 2e-13 in float64, 2e-6 in float32, 1e-3 in float16 and 8e-3 in bfloat16 (for products by central
    differences min(10·u^⅔, √u), with u the rounding unit, and at least epsilon²), or up to `rtol`. For a method with a
    positive `damping`, the exact answer is that of H + damping·I. A result that does not claim to have converged is
    recorded with its error and is not wrong, unless `formula` says what it must be. Nor is a claim outside of what the
    method states to be good for (it, or its products, assume a symmetric H), or one that leaves room for more than
    50 %. A graph that refuses the method is recorded with the reason.

    **Laws**, kept by converged and truncated methods alike, up to 10 √u but at most 30 % (or what the residuals
    reported leave room for): the same answer twice; nothing is changed, neither by `engine.hypergradient` nor in a
    step; homogeneous and (unless truncated) additive in the cotangent; zero for zero; invariant under permutation and
    splitting of parameter tensors; unused parameters change nothing and frozen ones are constants; right for H = c·I
    where 1/c is the scale, and nowhere pointing away from the exact answer; one learning rate per parameter group; L2
    decay of the optimizer the same as in the loss; maximising −L the same as minimising L; the residual reported is
    the true one; singular and non-finite systems are never reported as solved; a warm start changes nothing of what a
    solve converges to.

    Every stage has SGD with the learning rate 0.1 (`KnownProblem.learning_rate`), which some methods take for their
    scale. A method that differentiates through optimizer steps is run after three of them at the solution. Four nested
    levels are left out by default for a method that needs more than a thousand products for three.

    Args:
        method: an instance of `mlo.HypergradientMethod`.
        problems: which problems; `None` for all of `mlo.testing.zoo`.
        formula: from a stage's Jacobian H to the matrix that the method puts in the place of H⁻¹, for a truncated
            method: `lambda h: 0.3 * torch.eye(len(h))` for `Identity(0.3)`. Compared on all graphs without nesting, and
            for subclasses of `mlo.ImplicitMethod` on nested ones (but for four levels with a solution that is kept), up
            to 10 · κ · ρ with the condition number κ of that matrix in the place of the stages' own; for a method
            that is no `ImplicitMethod`, at least up to the tolerance of the laws.
        rtol: the largest relative error that is right, instead of the above.
        dtype: the precision of all parameters: float64, float32, float16 or bfloat16.
        without: laws to leave out, by the names in the report. A method that draws a sketch of the parameters
            depends on how they are split, for instance.
        verbose: print each line as it is found.

    Returns:
        A report that is true if nothing is wrong; `str` of it is a table.

    Raises:
        ConfigurationError: an argument is of a wrong kind.

    Cost: a few seconds with a fast method on one thread; nested levels of depth four cost most.

    >>> import mlo.testing
    >>> few = [mlo.testing.zoo.ridge(), mlo.testing.zoo.indefinite()]
    >>> report = mlo.testing.check_method(mlo.ConjugateGradient(), problems=few)
    >>> report.ok, [r.outcome for r in report.problems]
    (True, ['exact', 'broke down'])

    """
    left_out = frozenset([without] if isinstance(without, str) else without)
    given = _checked_arguments(method, problems, formula, rtol, dtype, left_out)
    results, laws = [], []
    with Preserved():
        for result in _on_problems(method, given, formula, rtol, dtype, spare=problems is None):
            results.append(result)
            if verbose:
                print(f"{result.problem}: {result.outcome}, error {shown(result.error)}. {result.note}", flush=True)
        probe = Probe(method, dtype)
        for name in LAWS:
            laws.append(LawResult(name, "left out", "as asked") if name in left_out else keeps(name, probe))
            if verbose:
                print(f"{name}: {laws[-1].verdict}. {laws[-1].note}".rstrip(), flush=True)
    return MethodCheck(method, dtype, tuple(results), tuple(laws))


def _on_problems(
    method: HypergradientMethod,
    problems: Iterable[KnownProblem],
    formula: Inverse | None,
    rtol: float | None,
    dtype: torch.dtype,
    *,
    spare: bool,
) -> Iterator[ProblemResult]:
    """Run the problems one after the other; where time is to be spared, no deep ones that would take minutes."""
    fewest = math.inf
    for problem in problems:
        if spare and "deep" in problem.tags and _TOO_MANY < fewest < math.inf:
            note = f"three levels took {fewest} products; pass problems=[…] to run it"
            yield ProblemResult(problem.name, "left out", note=note)
            continue
        result, products = _on_problem(method, problem, formula, rtol, dtype)
        fewest = min(fewest, products) if products and "nested" in problem.tags else fewest
        yield result


def _on_problem(
    method: HypergradientMethod, problem: KnownProblem, formula: Inverse | None, rtol: float | None, dtype: torch.dtype
) -> tuple[ProblemResult, int]:
    """Return what a method gives on a problem, and how many products it took."""
    name = problem.name
    twin, watch = watched(method)
    try:
        with quiet():
            engine = ready(lambda steps: engine_of(problem.levels, twin, dtype=dtype, steps=steps), twin)
            watch.reports.clear()
            found = engine.hypergradient(problem.upper)
    except BreakdownError as error:
        return ProblemResult(name, "broke down", note=str(error)), watch.products
    except ConfigurationError as error:
        return ProblemResult(name, "refused", note=str(error)), 0
    except LossError as error:
        outcome: Outcome = "RAISED" if method.carries_gradient else "refused"
        return ProblemResult(name, outcome, note=f"{type(error).__name__}: {error}"), 0
    except Exception as error:  # a check must not end at the first mistake of what it checks
        return ProblemResult(name, "RAISED", note=f"{type(error).__name__}: {error}"), 0
    expected = problem.exact
    misfit = [n for n, p in expected.items() if n not in found or found[n].shape != p.shape or found[n].dtype != dtype]
    if misfit:
        result = ProblemResult(name, "WRONG", note=f"missing or of another shape or dtype: {', '.join(misfit)}")
    else:
        result = _judged(method, problem, {n: found[n].double() for n in expected}, watch, formula, rtol, dtype)
    return result, watch.products


def _judged(
    method: HypergradientMethod,
    problem: KnownProblem,
    found: dict[str, torch.Tensor],
    watch: Watch,
    formula: Inverse | None,
    rtol: float | None,
    dtype: torch.dtype,
) -> ProblemResult:
    """Compare a hypergradient with the exact one, or with the method's own formula."""
    by_formula = formula is not None and _has_formula(method, problem)
    expected, magnification = _expected(method, problem, formula if by_formula else None)
    error = _relative_error(found, expected)
    statuses = ", ".join(s.name for s in watch.statuses) or "reports no solve"
    if watch.broken is not None:
        return ProblemResult(problem.name, "broke down", error, note=statuses)
    if not by_formula and not watch.converged:
        return ProblemResult(problem.name, "not exact" if watch.reports else "no claim", error, note=statuses)
    tolerance = rtol
    if tolerance is None:
        claimed = 0.0 if by_formula else watch.worst_residual
        tolerance = 10 * magnification * max(_rounding(method, dtype), claimed)
        if by_formula and not isinstance(method, ImplicitMethod):
            tolerance = max(tolerance, same_answer(dtype))
    excuse = _excuse(method, problem, error, tolerance)
    if excuse:
        return ProblemResult(problem.name, "not compared", error, note=f"{statuses}, {excuse}")
    right: Outcome = "formula" if by_formula else "exact"
    return ProblemResult(problem.name, right if error <= tolerance else "WRONG", error, tolerance, statuses)


def _has_formula(method: HypergradientMethod, problem: KnownProblem) -> bool:
    """Whether a method's formula for the inverse says what it gives on a problem.

    In nested graphs it does for methods whose derivative is that of a solve, or nothing. Where four levels are nested,
    one gradient asks for several solves of one stage, between which a solution that is kept moves on.
    """
    if "nested" not in problem.tags or not method.carries_gradient:
        return True
    return isinstance(method, ImplicitMethod) and not (method.keeps_solutions and "deep" in problem.tags)


def _expected(
    method: HypergradientMethod, problem: KnownProblem, formula: Inverse | None
) -> tuple[dict[str, torch.Tensor], float]:
    """Return what a method must give, and how much it magnifies relative errors at most.

    It is what its formula says, if there is one, and else what a method that says that it converged must give.
    """
    damping = damping_of(method)
    if formula is None and damping > 0:
        return problem.with_inverse(lambda h: _damped_inverse(h, damping)), problem.condition
    if formula is None:
        return problem.exact, problem.condition
    conditions = [1.0]

    def measured(h: torch.Tensor) -> torch.Tensor:
        matrix = formula(h)
        conditions.append(float(torch.linalg.cond(matrix)) if matrix.any() else 1.0)
        return matrix

    return problem.with_inverse(measured), max(conditions) * len(problem.stages)


def _damped_inverse(h: torch.Tensor, damping: float) -> torch.Tensor:
    inverse: torch.Tensor = torch.linalg.inv(h + damping * torch.eye(len(h), dtype=h.dtype))
    return inverse


def _rounding(method: HypergradientMethod, dtype: torch.dtype) -> float:
    """Return what rounding may do to a method's products."""
    product = getattr(method, "product", None)
    if not isinstance(product, CentralDifferences):
        return ROUNDING[dtype]
    unit = float(torch.finfo(dtype).eps)
    # Differences are right to about u^⅔ by the default shift, and to its square by a larger one.
    return max(min(10 * math.pow(unit, 2 / 3), math.sqrt(unit)), ROUNDING[dtype], (product.epsilon or 0.0) ** 2)


def _excuse(method: HypergradientMethod, problem: KnownProblem, error: float, tolerance: float) -> str:
    """Return why a result is neither right nor wrong, or nothing."""
    if tolerance > _WEAK:
        return f"which leaves room for errors up to {tolerance:.0e}"
    if error > tolerance and "symmetric" not in problem.tags and _assumes_symmetric(method):
        return "but assumes a symmetric Hessian"
    return ""


def _assumes_symmetric(method: HypergradientMethod) -> bool:
    """Whether a method, or the way it forms products, takes H for Hᵀ."""
    directional = isinstance(getattr(method, "product", None), CentralDifferences | ForwardOverReverse)
    return directional or bool(getattr(method, "assumes_symmetric", False))


def _relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    a, b = (joined([x[n] for n in expected]) for x in (found, expected))
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def _checked_arguments(
    method: object,
    problems: Iterable[KnownProblem] | None,
    formula: object,
    rtol: object,
    dtype: object,
    without: Iterable[str],
) -> tuple[KnownProblem, ...]:
    if not isinstance(method, HypergradientMethod):
        hint = f"; write {method.__name__}()" if isinstance(method, type) else ""
        raise ConfigurationError(f"check_method(method={method!r}): expected an mlo.HypergradientMethod{hint}.")
    given = zoo.all_problems() if problems is None else tuple(problems)
    for p in given:
        if not isinstance(p, KnownProblem):
            raise ConfigurationError(f"check_method(problems=…): expected instances of KnownProblem; got {p!r}.")
    if formula is not None and not callable(formula):
        raise ConfigurationError(f"check_method(formula={formula!r}): expected a function from a matrix to a matrix.")
    if rtol is not None and not (is_number(rtol) and rtol > 0):  # type: ignore[operator]
        raise ConfigurationError(f"check_method(rtol={rtol!r}): expected a positive number or None.")
    if dtype not in ROUNDING:
        raise ConfigurationError(f"check_method(dtype={dtype!r}): expected one of {', '.join(map(str, ROUNDING))}.")
    unknown = [name for name in without if name not in LAWS]
    if unknown:
        raise ConfigurationError(
            f"check_method(without=…): there is no law {unknown[0]!r}; expected some of {', '.join(LAWS)}."
        )
    return given


def _short(note: str, ok: bool) -> str:
    """Return the beginning of a note where it is of no consequence, and all of it where something is wrong."""
    return note if not ok or len(note) <= _NOTE else f"{note[: _NOTE - 1]}…"
