"""Hypergradient methods: one abstract base, one method per file."""

from mlo.hypergradient.base import HypergradientMethod
from mlo.hypergradient.conjugate_gradient import ConjugateGradient
from mlo.hypergradient.dense import Dense
from mlo.hypergradient.finite_difference import FiniteDifference
from mlo.hypergradient.identity import Identity
from mlo.hypergradient.implicit import ImplicitMethod, Solution
from mlo.hypergradient.neumann import Neumann
from mlo.hypergradient.stop_gradient import StopGradient

__all__ = [
    "ConjugateGradient",
    "Dense",
    "FiniteDifference",
    "HypergradientMethod",
    "Identity",
    "ImplicitMethod",
    "Neumann",
    "Solution",
    "StopGradient",
]
