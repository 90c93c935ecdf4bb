"""What a check raises: something is wrong, or the reference itself could not be computed."""

from mlo.errors import MloError


class CheckError(MloError, AssertionError):
    """A check found something wrong; the message is its report."""


class NotSolvedError(MloError, ArithmeticError):
    """A stage could not be re-solved to the accuracy that a check needs."""
