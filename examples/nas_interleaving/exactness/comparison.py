"""The hypergradient of each method beside the exact one, at the stages' solutions and on the way to them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mlo
from examples.nas_interleaving.exactness.reference import Solved, place, weights_of
from examples.nas_interleaving.exactness.smooth import stages_of
from examples.nas_interleaving.passes import PassCounter
from examples.nas_interleaving.stages import ARCHITECTURE

#: In the place of a number of steps: the stages' solutions.
SOLVED = math.inf
#: The shift of the DARTS paper: ε = 0.01/‖v‖.
DARTS_SHIFT = 0.01

METHODS: Mapping[str, mlo.HypergradientMethod] = {
    "no response (first order)": mlo.StopGradient(),
    "one step, differences (the paper)": mlo.Unroll(steps=1, product=mlo.CentralDifferences(epsilon=DARTS_SHIFT)),
    "FiniteDifference": mlo.FiniteDifference(),
    "Identity": mlo.Identity(scale=None),
    "Unroll, 5 steps": mlo.Unroll(steps=5),
    "Unroll, 20 steps": mlo.Unroll(steps=20),
    "Unroll, 100 steps": mlo.Unroll(steps=100),
    "Neumann, 5 terms": mlo.Neumann(terms=5),
    "Neumann, 20 terms": mlo.Neumann(terms=20),
    "Neumann, 100 terms": mlo.Neumann(terms=100),
    "ConjugateGradient, 5 steps": mlo.ConjugateGradient(max_steps=5),
    "ConjugateGradient": mlo.ConjugateGradient(max_steps=1000, rtol=1e-11),
    "MINRES": mlo.MINRES(max_steps=1000, rtol=1e-11),
    "Dense": mlo.Dense(),
}


#: The stages' weights by the number of steps that led there.
Weights = dict[float, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Result:
    """How close one hypergradient is to the exact one.

    Attributes:
        cosine: of the angle between them.
        error: relative, ‖found − exact‖ / ‖exact‖.
        broken: whether a solve has broken down.
        forward: passes forward through the stages' networks for this hypergradient.
        reverse: passes back from their scores.

    """

    cosine: float
    error: float
    broken: bool
    forward: int
    reverse: int


def steps_back(method: mlo.HypergradientMethod) -> int:
    """Return how many steps of the stages a method goes back."""
    return (method.steps or 1) if isinstance(method, mlo.Unroll) else 0


class Comparison:
    """Measures methods on one search.

    Args:
        problems: of the search; their weights are moved about.
        exact: the reference.
        at: the stages' weights by the number of steps that led there.

    """

    def __init__(
        self, problems: Sequence[mlo.Problem], exact: Solved, at: Mapping[float, Mapping[str, Tensor]]
    ) -> None:
        self._problems = problems
        self._exact = exact
        self._at = {**at, SOLVED: exact.weights}
        self._passes = PassCounter()
        self._passes.attach(stage.module for stage in stages_of(problems))

    def measure(self, method: mlo.HypergradientMethod, steps: float = SOLVED) -> Result | None:
        """Measure a method, the same for all stages, at the weights after so many steps.

        A method that goes back through T steps starts from the weights T steps earlier; `None` where there are fewer.
        At the solutions (`SOLVED`) it takes its steps from there, and stays.
        """
        back = steps_back(method)
        if steps - back not in self._at:
            return None
        place(self._problems, self._at[steps - back])
        for stage in stages_of(self._problems):
            stage.hypergradient, stage.steps = method, max(back, 1)
        engine = mlo.Engine(self._problems)
        engine.problems[ARCHITECTURE].warmup = 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", mlo.BreakdownWarning)
            if back:
                engine.step()
            before = self._passes.counts()
            found = engine.hypergradient(ARCHITECTURE)
        slopes = torch.cat([g.flatten() for g in found.values()]) @ self._exact.directions
        expected = self._exact.slopes
        passes = {name: count - before[name] for name, count in self._passes.counts().items()}
        return Result(
            cosine=torch.nn.functional.cosine_similarity(slopes, expected, dim=0).item(),
            error=((slopes - expected).norm() / expected.norm()).item(),
            broken=any(issubclass(w.category, mlo.BreakdownWarning) for w in caught),
            **passes,
        )


def trained(problems: Sequence[mlo.Problem], wanted: Iterable[int]) -> Weights:
    """Return the stages' weights after these numbers of steps of each, the architecture held where it is."""
    found: Weights = {}
    for stage in stages_of(problems):
        stage.hypergradient, stage.steps = mlo.StopGradient(), 1
    engine = mlo.Engine(problems)
    last = max(wanted := set(wanted))
    engine.problems[ARCHITECTURE].warmup = last + 1
    for step in range(last + 1):
        if step in wanted:
            found[step] = weights_of(problems)
        engine.step()
    return found
