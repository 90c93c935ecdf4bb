"""Hypergradient methods: one abstract base, one method per file."""

from mlo.hypergradient.adaptive_identity import AdaptiveIdentity
from mlo.hypergradient.base import HypergradientMethod
from mlo.hypergradient.conjugate_gradient import ConjugateGradient
from mlo.hypergradient.dense import Dense
from mlo.hypergradient.f2sa import F2SA
from mlo.hypergradient.finite_difference import FiniteDifference
from mlo.hypergradient.gmres import GMRES
from mlo.hypergradient.identity import Identity
from mlo.hypergradient.implicit import ImplicitMethod, Solution
from mlo.hypergradient.minres import MINRES
from mlo.hypergradient.neumann import Neumann
from mlo.hypergradient.nystrom import Nystrom
from mlo.hypergradient.soba import SOBA
from mlo.hypergradient.stop_gradient import StopGradient
from mlo.hypergradient.unroll import Unroll

__all__ = [
    "F2SA",
    "GMRES",
    "MINRES",
    "SOBA",
    "AdaptiveIdentity",
    "ConjugateGradient",
    "Dense",
    "FiniteDifference",
    "HypergradientMethod",
    "Identity",
    "ImplicitMethod",
    "Neumann",
    "Nystrom",
    "Solution",
    "StopGradient",
    "Unroll",
]
