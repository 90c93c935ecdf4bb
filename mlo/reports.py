"""What a step of the engine tells about each problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlo.status import SolveReport, Status

Outcome = Literal["stepped", "warm-up", "no optimizer", "skipped", "idle"]


@dataclass(frozen=True)
class SolveSummary:
    """All solves of one response node, in one engine step, for the sake of one problem's gradients.

    Attributes:
        solves: how many times the stage's inverse Hessian was applied. In a nested graph the products of an
            outer solve need inner ones.
        products: Hessian–vector products in total.
        iterations: steps of the solvers in total.
        worst_residual: the largest relative residual, `None` where the method forms none.
        statuses: how often each status ended a solve.
        gradient_norm: the largest norm of the stage's own gradient where its response was taken: how far from solved
            it is; `None` where the method does not form it.

    """

    solves: int
    products: int
    iterations: int
    worst_residual: float | None
    statuses: Mapping[Status, int]
    gradient_norm: float | None = None

    @classmethod
    def of(cls, reports: Sequence[SolveReport]) -> SolveSummary:
        """Add up the reports of some solves."""
        products = iterations = 0
        residual = distance = None
        statuses: dict[Status, int] = {}
        for r in reports:
            products += r.products
            iterations += r.iterations
            residual = _larger(residual, r.relative_residual)
            distance = _larger(distance, r.gradient_norm)
            statuses[r.status] = statuses.get(r.status, 0) + 1
        return cls(len(reports), products, iterations, residual, statuses, distance)

    @property
    def ok(self) -> bool:
        """Whether no solve broke down."""
        return all(status.ok for status in self.statuses)


@dataclass(frozen=True)
class ProblemReport:
    """What one problem did in one step of the engine.

    Attributes:
        problem: its name.
        outcome: `"stepped"`; `"warm-up"` or `"no optimizer"` where it takes no steps; `"skipped"` where a solve
            broke down and its policy was to skip; `"idle"` where nothing asked it to step.
        steps: optimizer steps taken.
        loss: the last loss, `None` where none was evaluated.
        metrics: what the loss logged beside it, at the last step.
        gradient_norm: Euclidean norm of the last total gradient, before clipping.
        solves: for each response node that the problem's gradients went through, what its solves cost, by the
            path to the node: `"top/mid"` is the node of `mid` in the loss of `top`, and `"top/mid/low"` the
            node of `low` inside the gradient of `mid`.
        validation: the metrics of the validation that followed this step, if one did.

    """

    problem: str
    outcome: Outcome = "idle"
    steps: int = 0
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    gradient_norm: float | None = None
    solves: Mapping[str, SolveSummary] = field(default_factory=dict)
    validation: Mapping[str, float] | None = None


def _larger(a: float | None, b: float | None) -> float | None:
    return b if a is None or (b is not None and b > a) else a


def summarised(reports: Sequence[SolveReport]) -> dict[str, SolveSummary]:
    """Return one summary per path."""
    by_path: dict[str, list[SolveReport]] = {}
    for report in reports:
        by_path.setdefault(report.stage, []).append(report)
    return {path: SolveSummary.of(solves) for path, solves in by_path.items()}
