"""The errors and warnings of `mlo`: each names what is wrong, what was expected, and the remedy.

Exceptions that come from a user's own code (a loss, a data loader, an optimizer) are never wrapped:
they keep their type.
"""


class MloError(Exception):
    """Base of every error that `mlo` raises on its own account."""


class ConfigurationError(MloError, ValueError):
    """A problem, an option or a method is given a value that it cannot have."""


class GraphError(ConfigurationError):
    """The problems and their dependencies do not form a graph that can be solved in the given order."""


class DependencyError(MloError, AttributeError, KeyError):
    """A loss reaches for a dependency or a parameter that its problem does not declare.

    It is an `AttributeError` and a `KeyError`, so that `hasattr`, `getattr` with a default and
    `in` behave as they do elsewhere in Python.
    """

    def __str__(self) -> str:
        """Return the message itself (`KeyError` alone would quote it)."""
        return str(self.args[0]) if self.args else ""


class LossError(MloError, ValueError):
    """A training step returned something that cannot be minimised: no scalar, no graph, NaN."""


class EvaluationError(MloError, RuntimeError):
    """A loss reached parameters past their binding, or changed them in place."""


class BreakdownError(MloError, ArithmeticError):
    """A hypergradient solve broke down and its method's policy does not let the result be used.

    Attributes:
        report: the `SolveReport` of the solve.
        skip: whether the policy is `"skip"`; `Engine.step` then leaves out the optimizer step.

    """

    def __init__(self, message: str, report: object = None, *, skip: bool = False) -> None:
        """Keep the report of the solve beside the message."""
        super().__init__(message)
        self.report = report
        self.skip = skip


class MloWarning(UserWarning):
    """Base of every warning that `mlo` gives."""


class BreakdownWarning(MloWarning):
    """A hypergradient solve broke down; its result is used all the same (policy `"warn"`)."""


class UnusedDependencyWarning(MloWarning):
    """A problem declares a dependency that its loss did not use in its first step."""
