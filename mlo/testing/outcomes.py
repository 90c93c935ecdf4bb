"""What a conformance check finds: one line per problem and per law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal[
    "exact", "formula", "not exact", "broke down", "no claim", "refused", "not compared", "left out", "WRONG", "RAISED"
]
Verdict = Literal["ok", "BROKEN", "left out"]


@dataclass(frozen=True)
class ProblemResult:
    """What a method gave on one problem.

    Attributes:
        problem: its name.
        outcome: `"exact"`: the method says that it converged and is right. `"formula"`: it equals the formula given
            for it. `"WRONG"`: neither, although it should. `"not exact"`: it does not claim to be. `"broke down"`, as
            it reports itself. `"no claim"`: it reports no solve. `"refused"`: the graph does not allow it, or it says
            that it cannot. `"not compared"`: its claim is outside of what it states to be good for, or too weak to be
            tested. `"left out"`: it would take too long. `"RAISED"`: an exception.
        error: relative error of the whole hypergradient against the exact one (or the formula), where there is one.
        tolerance: the largest that is right, where it is a matter of right and wrong.
        note: statuses, reasons, messages.

    """

    problem: str
    outcome: Outcome
    error: float | None = None
    tolerance: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.outcome not in ("WRONG", "RAISED")


@dataclass(frozen=True)
class LawResult:
    """Whether a method keeps a law.

    Attributes:
        law: its name.
        verdict: `"left out"` where it does not apply.
        note: what was found, or why it was left out.

    """

    law: str
    verdict: Verdict
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the law is not broken."""
        return self.verdict != "BROKEN"
