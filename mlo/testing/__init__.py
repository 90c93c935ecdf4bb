"""Checks of hypergradients, of methods, and problems with known exact answers.

`import mlo` does not import this package; write `import mlo.testing`.
"""

from mlo.testing import zoo
from mlo.testing.comparison import Comparison
from mlo.testing.errors import CheckError, NotSolvedError
from mlo.testing.hypergradient_check import HypergradientCheck, check_hypergradient
from mlo.testing.known_problem import KnownProblem
from mlo.testing.lbfgs import LBFGS
from mlo.testing.level import Layout, with_gradient
from mlo.testing.method_check import MethodCheck, check_method
from mlo.testing.newton import Newton
from mlo.testing.outcomes import LawResult, ProblemResult
from mlo.testing.solver import Solver

__all__ = [
    "LBFGS",
    "CheckError",
    "Comparison",
    "HypergradientCheck",
    "KnownProblem",
    "LawResult",
    "Layout",
    "MethodCheck",
    "Newton",
    "NotSolvedError",
    "ProblemResult",
    "Solver",
    "check_hypergradient",
    "check_method",
    "with_gradient",
    "zoo",
]
