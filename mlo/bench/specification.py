"""`Method`: an approximation of the hypergradient with its budget, in words that every library shares."""

from __future__ import annotations

from dataclasses import dataclass

from mlo.errors import ConfigurationError

#: ‖εd‖ of "fd" in every library: the length of the shift, as in DARTS and in Betty.
SHIFT = 0.01

#: The damping of "nystrom" in units of λmax.
NYSTROM_DAMPING = 0.1

#: The kinds, whether each has a budget, and what it is.
KINDS = {
    "fd": "the identity times a scale for H⁻¹, the mixed product by a central difference at the solved weights",
    "identity": "the identity times a scale for H⁻¹ (T1-T2)",
    "neumann": "that many terms of the Neumann series with factor 1/λmax (the learning rate where it is not known)",
    "cg": "that many steps of conjugate gradients from zero, without a tolerance",
    "gmres": "that many steps of GMRES from zero",
    "minres": "that many steps of MINRES from zero",
    "nystrom": "a Nyström approximation of that rank, with a damping of 0.1 λmax",
    "unroll": "differentiate through that many steps of gradient descent with step 1/λmax from the initial weights",
    "dense": "the Hessian written out and solved",
}
_WITHOUT_BUDGET = ("fd", "identity", "dense")


@dataclass(frozen=True)
class Method:
    """An approximation and its budget.

    >>> Method.parse("cg:20")
    Method(kind='cg', budget=20)
    >>> str(Method("fd"))
    'fd'

    """

    kind: str
    budget: int | None = None

    def __post_init__(self) -> None:
        """Check the kind and the budget."""
        if self.kind not in KINDS:
            raise ConfigurationError(f"method {self.kind!r}: expected one of {', '.join(KINDS)}.")
        if self.kind in _WITHOUT_BUDGET:
            if self.budget is not None:
                raise ConfigurationError(f"method {self}: {self.kind} has no budget; expected {self.kind!r} alone.")
        elif self.budget is None or self.budget < 1:
            raise ConfigurationError(
                f"method {self}: expected {self.kind!r} with a budget of at least 1, e.g. '{self.kind}:20'."
            )

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read "kind" or "kind:budget".

        Raises:
            ConfigurationError: there is no such kind, or the budget is not one.

        """
        kind, colon, budget = text.strip().partition(":")
        if colon and not budget.isdecimal():
            raise ConfigurationError(f"method {text!r}: expected a kind and a whole number, e.g. 'cg:20'.")
        return cls(kind, int(budget) if colon else None)

    def __str__(self) -> str:
        """Return what `parse` reads."""
        return self.kind if self.budget is None else f"{self.kind}:{self.budget}"
