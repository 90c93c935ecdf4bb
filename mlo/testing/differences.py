"""A derivative by extrapolated central differences, with an estimate of its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_MOST_LEVELS = 6


@dataclass(frozen=True)
class Derivative:
    """A number and how far it may be from the truth."""

    value: float
    uncertainty: float


def derivative(function: Callable[[float], float], step: float, *, rtol: float, size: float = 0.0) -> Derivative:
    """Return dφ/dt at t = 0 by Ridders' method.

    Central differences D(h) = [φ(h) − φ(−h)] / 2h have an error in even powers of h, so that with steps
    h, h/2, h/4, … the combinations T(k, m) = [4ᵐ T(k, m−1) − T(k−1, m−1)] / (4ᵐ − 1) of D = T(·, 0) have an error
    of order h^(2m+2). The entry that differs least from its two ancestors is taken. That difference, with the
    rounding of φ over h, is the uncertainty. The table ends once it is below `rtol` times the value, or
    when halving the step further only adds rounding. `size` is that of the numbers that φ is computed from, where it is
    larger than φ itself.

    Cost: two evaluations per level, four at least and twelve at most.

    Source: Ridders, "Accurate computation of F'(x) and F'(x) F''(x)", Advances in Engineering Software 4, 1982.

    >>> d = derivative(lambda t: math.exp(2 * t), 0.1, rtol=1e-9)
    >>> abs(d.value - 2) < 1e-9 and d.uncertainty < 1e-8
    True

    """
    best = Derivative(math.nan, math.inf)
    before: list[float] = []
    for level in range(_MOST_LEVELS):
        h = step / 2**level
        ahead, behind = function(h), function(-h)
        row = [(ahead - behind) / (2 * h)]
        rounding = 4 * 2**-52 * max(abs(ahead), abs(behind), size) / h
        for m, ancestor in enumerate(before, 1):
            row.append((4**m * row[-1] - ancestor) / (4**m - 1))
            uncertainty = max(abs(row[-1] - row[-2]), abs(row[-1] - ancestor)) + rounding
            if uncertainty < best.uncertainty:
                best = Derivative(row[-1], uncertainty)
        if level and (best.uncertainty <= rtol * abs(best.value) or best.uncertainty <= 2 * rounding):
            break
        before = row
    return best
