"""A method that tells how its solves ended, and whether they ended as they say."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from mlo.hypergradient import HypergradientMethod, ImplicitMethod, Solution
from mlo.linear_system import LinearSystem
from mlo.status import SolveReport, Status
from mlo.vectors import add, norm, subtract


@dataclass
class Watch:
    """What the solves of a watched method have done.

    Attributes:
        reports: all reports.
        residuals: for solves that say that they converged, the residual that they report and the true one.

    """

    reports: list[SolveReport] = field(default_factory=list)
    residuals: list[tuple[float, float]] = field(default_factory=list)

    @property
    def statuses(self) -> tuple[Status, ...]:
        """How the solves ended, each status once."""
        return tuple(dict.fromkeys(r.status for r in self.reports))

    @property
    def converged(self) -> bool:
        """Whether there was a solve and all say that they converged."""
        return self.statuses == (Status.CONVERGED,)

    @property
    def broken(self) -> Status | None:
        """The first status that is a breakdown."""
        return next((s for s in self.statuses if not s.ok), None)

    @property
    def products(self) -> int:
        """Hessian–vector products in total."""
        return sum(r.products for r in self.reports)

    @property
    def worst_residual(self) -> float:
        """The largest relative residual reported."""
        return max((r.relative_residual or 0.0 for r in self.reports), default=0.0)


def watched(method: HypergradientMethod) -> tuple[HypergradientMethod, Watch]:
    """Return a copy of a method that keeps the reports of its solves, and where it keeps them.

    The copy is of a subclass of the method's own class, so that whoever asks for its class or its options gets the same
    answers.
    """
    kind, watch = type(method), Watch()

    def settle(self: Any, *arguments: Any, **named: Any) -> Any:
        watch.reports += [a for a in (*arguments, *named.values()) if isinstance(a, SolveReport)]
        return kind.settle(self, *arguments, **named)

    def solve(self: Any, system: LinearSystem) -> Any:
        result = kind.solve(self, system)  # type: ignore[attr-defined]
        if isinstance(result, Solution) and result.status is Status.CONVERGED:
            watch.residuals.append((result.relative_residual or 0.0, _true_residual(self, system, result)))
        return result

    changes: dict[str, Any] = {"settle": settle, "__slots__": (), "__module__": kind.__module__}
    if isinstance(method, ImplicitMethod):
        changes["solve"] = solve
    twin = copy.copy(method)
    object.__setattr__(twin, "__class__", type(kind.__name__, (kind,), changes))
    return twin, watch


def damping_of(method: HypergradientMethod) -> float:
    """Return the option `damping` of a method, which is taken to mean that H + damping·I stands for H."""
    damping = getattr(method, "damping", 0.0)
    return float(damping) if isinstance(damping, float | int) else 0.0


def _true_residual(method: HypergradientMethod, system: LinearSystem, result: Solution) -> float:
    """Return ‖c − (H + damping·I)λ‖ / ‖c‖ by a product of its own."""
    rhs = system.rhs
    if norm(rhs) == 0:
        return 0.0 if norm(result.vector) == 0 else math.inf
    products = system.products
    image = add(system.product(result.vector), result.vector, damping_of(method))
    system.products = products
    return norm(subtract(rhs, image)) / norm(rhs)
