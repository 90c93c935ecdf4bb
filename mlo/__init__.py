"""`mlo`: gradient-based multi-level optimization for PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from mlo.distance import squared_distance
from mlo.engine import Engine
from mlo.errors import (
    BreakdownError,
    BreakdownWarning,
    ConfigurationError,
    DependencyError,
    EvaluationError,
    GraphError,
    LossError,
    MloError,
    MloWarning,
    UnusedDependencyWarning,
)
from mlo.graph import ProblemGraph
from mlo.hypergradient import (
    F2SA,
    GMRES,
    MINRES,
    SOBA,
    AdaptiveIdentity,
    ConjugateGradient,
    Dense,
    FiniteDifference,
    HypergradientMethod,
    Identity,
    ImplicitMethod,
    Neumann,
    Nystrom,
    Solution,
    StopGradient,
    Unroll,
)
from mlo.linear_system import LinearSystem
from mlo.problem import Problem
from mlo.products import CentralDifferences, DoubleBackward, ForwardOverReverse
from mlo.reports import ProblemReport, SolveSummary
from mlo.response import best_response
from mlo.status import SolveReport, Status

try:
    __version__ = version("mlo-torch")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "F2SA",
    "GMRES",
    "MINRES",
    "SOBA",
    "AdaptiveIdentity",
    "BreakdownError",
    "BreakdownWarning",
    "CentralDifferences",
    "ConfigurationError",
    "ConjugateGradient",
    "Dense",
    "DependencyError",
    "DoubleBackward",
    "Engine",
    "EvaluationError",
    "FiniteDifference",
    "ForwardOverReverse",
    "GraphError",
    "HypergradientMethod",
    "Identity",
    "ImplicitMethod",
    "LinearSystem",
    "LossError",
    "MloError",
    "MloWarning",
    "Neumann",
    "Nystrom",
    "Problem",
    "ProblemGraph",
    "ProblemReport",
    "Solution",
    "SolveReport",
    "SolveSummary",
    "Status",
    "StopGradient",
    "Unroll",
    "UnusedDependencyWarning",
    "__version__",
    "best_response",
    "squared_distance",
]
