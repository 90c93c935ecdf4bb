"""How a hypergradient solve ended: `Status` carries its remedy, `SolveReport` the figures."""

from __future__ import annotations

import enum
from dataclasses import dataclass


@enum.unique
class Status(enum.Enum):
    """The end of one solve. The value of a member is its explanation and its remedy.

    >>> Status.CONVERGED.ok, Status.NEGATIVE_CURVATURE.ok
    (True, False)
    >>> "damping" in Status.NEGATIVE_CURVATURE.remedy
    True
    """

    CONVERGED = "The linear system is solved to the tolerance asked for; nothing to do."
    APPROXIMATE = (
        "No linear system is solved: the method replaces the inverse Hessian by a fixed approximation. "
        "Where accuracy matters, compare with ConjugateGradient or Dense."
    )
    TRUNCATED = (
        "The solve used up its steps before it reached its tolerance, which is usual for a truncated method. "
        "For a more exact hypergradient allow more of them (terms, max_steps), raise damping, "
        "or loosen rtol to what you need."
    )
    NEGATIVE_CURVATURE = (
        "A direction of negative curvature was met: the stage's Hessian is not positive definite at its "
        "present solution. Train the stage further (more steps), regularise its loss, give the method damping, "
        "or use MINRES, GMRES or Dense, which do not need positive definiteness, or FiniteDifference or Identity."
    )
    DIVERGED = (
        "The residual grew: the series does not converge at this scale. Use a scale below 2 / (largest "
        "eigenvalue of the stage's Hessian), or ConjugateGradient, which needs no scale."
    )
    SINGULAR = (
        "The stage's Hessian is singular to rounding: its solution is not unique. Regularise the loss (weight decay, a "
        "proximal term), give the method damping, or use MINRES."
    )
    NON_FINITE = (
        "The solve met NaN or infinite values. Look at the stage's loss and the upper loss at these parameters; "
        "lower the learning rates, clip gradients (grad_clip), or raise the precision."
    )

    def __repr__(self) -> str:
        """Return the name alone: the value is a paragraph."""
        return f"Status.{self.name}"

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return self.value

    @property
    def ok(self) -> bool:
        """Whether the result can be used as the method promises (it did not break down)."""
        return self in _OK


_OK = (Status.CONVERGED, Status.APPROXIMATE, Status.TRUNCATED)


@dataclass(frozen=True)
class SolveReport:
    """What one application of a stage's inverse Hessian did and cost.

    Attributes:
        stage: name of the stage; in nested graphs the path that leads to it, e.g. `"top/mid/low"`.
        method: name of the method's class.
        status: how the solve ended.
        iterations: steps of the solver (terms of a series, rows of a dense Hessian).
        relative_residual: ‖c − Hλ‖ / ‖c‖ as the solver knows it, dimensionless; `None` where the
            method does not form it.
        products: Hessian–vector products spent, those of setting up the solve included.
        gradient_norm: ‖g‖, the Euclidean norm of the stage's own gradient (the optimizer's L2 decay included) where
            its response was taken: how far from solved the stage is. The implicit function theorem assumes 0. `Unroll`
            gives the one before the last step. `None` where the method does not form it: `FiniteDifference`, whose two
            gradients are in x alone.

    """

    stage: str
    method: str
    status: Status
    iterations: int
    relative_residual: float | None
    products: int
    gradient_norm: float | None = None

    @property
    def converged(self) -> bool:
        """Whether the linear system was solved to its tolerance."""
        return self.status is Status.CONVERGED

    def __str__(self) -> str:
        """Return one line with the figures, without the remedy."""
        residual = "not formed" if self.relative_residual is None else f"{self.relative_residual:.1e}"
        distance = "" if self.gradient_norm is None else f", gradient norm of the stage {self.gradient_norm:.1e}"
        return (
            f"{self.stage}: {self.method} {self.status.name}, {self.iterations} iterations, "
            f"{self.products} products, relative residual {residual}{distance}"
        )
