"""One line of a check: directional derivatives by a method and by re-solving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlo.status import Status
from mlo.testing.differences import Derivative

Verdict = Literal["ok", "WRONG", "UNRESOLVED"]

# A difference that could be explained by this multiple of the reference's own uncertainty says nothing.
_RESOLVED = 3.0


@dataclass(frozen=True)
class Comparison:
    """Derivatives along some directions, compared with re-solving.

    Attributes:
        name: the stage, or `"total"` for the whole hypergradient (`"total, parameter …"` along one parameter).
        method: the class of the stage's method; empty for the total.
        statuses: how its solves ended, each status once.
        found: ⟨gradient, d⟩ for each direction d.
        expected: the same by differences of what re-solving gives.
        uncertainties: how far each of the expected numbers may be from the truth.
        rtol: the largest relative error that is right.
        atol: differences up to this size are right whatever the relative error.

    """

    name: str
    method: str
    statuses: tuple[Status, ...]
    found: tuple[float, ...]
    expected: tuple[float, ...]
    uncertainties: tuple[float, ...]
    rtol: float
    atol: float

    @property
    def error(self) -> float:
        """‖found − expected‖ / max(‖found‖, ‖expected‖) over the directions, 0 where both are."""
        size = max(math.hypot(*self.found), math.hypot(*self.expected))
        return self._difference / size if size else 0.0

    @property
    def uncertainty(self) -> float:
        """How much of the error may be the reference's own, likewise."""
        size = max(math.hypot(*self.found), math.hypot(*self.expected))
        return math.hypot(*self.uncertainties) / size if size else 0.0

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance."""
        size = max(math.hypot(*self.found), math.hypot(*self.expected))
        return self._difference <= self.atol + self.rtol * size

    @property
    def verdict(self) -> Verdict:
        """`"ok"`, `"WRONG"`, or `"UNRESOLVED"` where re-solving itself is not accurate enough to tell."""
        if self.ok:
            return "ok"
        unclear = self._difference <= _RESOLVED * math.hypot(*self.uncertainties)
        return "UNRESOLVED" if unclear else "WRONG"

    @property
    def _difference(self) -> float:
        return math.dist(self.found, self.expected)


def compared(
    name: str,
    found: Sequence[float],
    expected: Sequence[Derivative],
    *,
    rtol: float,
    atol: float,
    method: str = "",
    statuses: Sequence[Status] = (),
) -> Comparison:
    """Return the comparison of some derivatives."""
    return Comparison(
        name=name,
        method=method,
        statuses=tuple(dict.fromkeys(statuses)),
        found=tuple(found),
        expected=tuple(d.value for d in expected),
        uncertainties=tuple(d.uncertainty for d in expected),
        rtol=rtol,
        atol=atol,
    )
