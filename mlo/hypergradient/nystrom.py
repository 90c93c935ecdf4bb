"""The inverse Hessian by a low-rank approximation from some of its columns."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.implicit import ImplicitMethod, Solution
from mlo.linear_system import LinearSystem
from mlo.options import is_count, is_number
from mlo.status import Status
from mlo.vectors import Vector, norm, rounding_unit, zeros_like


@dataclass(frozen=True)
class Nystrom(ImplicitMethod):
    """λ = (H_k + damping·I)⁻¹ c with H_k = C W⁺ Cᵀ, where C are `rank` columns of H and W their rows of C.

    The columns are drawn uniformly without replacement. For positive semi-definite H, H_k lies between 0 and H, is
    exact on the columns drawn, and equals H as soon as they span its range, as with `rank` at least the number of
    parameters: the result is then (H + damping·I)⁻¹ c. It is good where few eigenvalues of H stand out and the others
    are small beside the damping, and a poor one where the damping is small beside the eigenvalues that are missed,
    since it replaces these by it. H must be symmetric; negative eigenvalues of W are left out, so that H_k is positive
    semi-definite whatever H is.

    The columns are the same at each solve, so that λ is linear in c and the inverse symmetric, as stages above a
    nested one need.

    Args:
        rank: number of columns, at least 1; all of them are used where there are no more.
        damping: added to the diagonal, positive: λ is of length ‖c‖/damping where H_k sees nothing.
        seed: of the generator that draws the columns, which is the method's own.
        on_breakdown: see `HypergradientMethod`. Breaks down on non-finite values only.

    Raises:
        ConfigurationError: an option is out of range.

    Cost: `rank` Hessian–vector products and one mixed product; `rank` vectors of the stage's size, in float32 at least,
    for a while three times as much for the largest parameter; O(n·rank²) operations, n the number of parameters.

    Source: Hataya and Yamada, "Nyström method for accurate and scalable implicit differentiation", AISTATS 2023. The
    inverse is applied through the eigenvectors of H_k, as in Frangella, Tropp and Udell, "Randomized Nyström
    preconditioning", SIAM J. Matrix Anal. Appl. 2023, and not by Woodbury's formula itself, which loses all digits
    where damping is small.

    >>> import mlo, torch
    >>> def loss(w, x):                                   # H = diag(1, 3), and λ = c / (H + 1)
    ...     return (torch.tensor([0.5, 1.5]) * w**2).sum() - (w * x).sum()
    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> w = mlo.best_response(loss, torch.tensor([3.0, 4 / 3]), x, mlo.Nystrom(rank=2, damping=1.0))
    >>> torch.autograd.grad(w.sum(), x)[0].numpy().round(6).tolist()
    [0.5, 0.25]

    """

    rank: int
    damping: float
    seed: int = 0

    assumes_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not is_count(self.rank):
            raise self.option_error("rank", "an integer of at least 1")
        if not is_number(self.damping) or self.damping <= 0:
            raise self.option_error("damping", "a positive number")
        if not _is_integer(self.seed):
            raise self.option_error("seed", "an integer")

    def solve(self, system: LinearSystem) -> Solution:
        """Return (H_k + damping·I)⁻¹ c."""
        size = system.rhs_norm
        if size == 0:
            return Solution(zeros_like(system.rhs), Status.CONVERGED, 0, 0.0)
        if not math.isfinite(size):
            return Solution(system.rhs, Status.NON_FINITE, 0, None)
        adjoint = self.inverse(system)(system.rhs)
        status = Status.APPROXIMATE if math.isfinite(norm(adjoint)) else Status.NON_FINITE
        return Solution(adjoint, status, system.products, relative_residual=None)

    def inverse(self, system: LinearSystem) -> ApproximateInverse:
        """Return c ↦ (H_k + damping·I)⁻¹ c, at the cost of `rank` products; NaN where the columns are not finite.

        C = QR turns H_k into Q (R W⁺ Rᵀ) Qᵀ, whose eigenvectors are Q times those of a small matrix.
        """
        like = system.rhs
        chosen = self._draw(sum(t.numel() for t in like))
        columns = _columns(system, chosen)
        if not all(bool(torch.isfinite(part).all()) for part in columns):
            nothing = torch.zeros(0, dtype=torch.float64)
            return ApproximateInverse(tuple(part[:, :0] for part in columns), nothing, math.nan)
        square = _rows(columns, chosen)
        values, vectors = torch.linalg.eigh((square + square.mT) / 2)
        # What is below the rounding of W is taken for zero: its inverse would be noise. So are negative eigenvalues.
        kept = values > len(chosen) ** 0.5 * rounding_unit(like) * values[-1].clamp(min=0)
        # One decomposition for each parameter and one of what they leave: the columns are never joined. Each takes the
        # place of what it decomposes.
        triangles = []
        for i, part in enumerate(columns):
            columns[i], triangle = torch.linalg.qr(part)
            triangles.append(_precise(triangle))
        small = torch.cat(triangles) @ (vectors[:, kept] / values[kept].sqrt())
        directions, roots, _ = torch.linalg.svd(small, full_matrices=False)
        for i, turn in enumerate(directions.split([len(t) for t in triangles])):
            columns[i] = columns[i] @ turn.to(device=columns[i].device, dtype=columns[i].dtype)
        return ApproximateInverse(tuple(columns), roots.square(), float(self.damping))

    def _draw(self, size: int) -> list[int]:
        """Return `rank` of the numbers below `size` in ascending order, by Floyd's algorithm, which keeps no others."""
        if self.rank >= size:
            return list(range(size))
        generator = torch.Generator().manual_seed(int(self.seed))
        drawn: set[int] = set()
        for last in range(size - self.rank, size):
            number = int(torch.randint(last + 1, (), generator=generator))
            drawn.add(last if number in drawn else number)
        return sorted(drawn)


@dataclass(frozen=True)
class ApproximateInverse:
    """c ↦ (V diag(μ) Vᵀ + damping·I)⁻¹ c for orthonormal V, symmetric positive definite.

    Attributes:
        vectors: V, one matrix for each parameter, a column for each eigenvalue.
        values: μ, in descending order, none of them negative.
        damping: what stands for the eigenvalues in all other directions.

    """

    vectors: Vector
    values: Tensor
    damping: float

    @property
    def largest(self) -> float:
        """The largest eigenvalue, which for a positive semi-definite H is at most that of H."""
        return self.values[0].item() if len(self.values) else 0.0

    def __call__(self, vector: Vector) -> Vector:
        """Return the inverse times `vector`."""
        flat = [t.reshape(-1).to(v.dtype) for t, v in zip(vector, self.vectors, strict=True)]
        seen = sum((_precise(v.mT @ t) for t, v in zip(flat, self.vectors, strict=True)), torch.zeros_like(self.values))
        # Where V spans everything, what is outside is rounding alone, and must not be divided by the damping.
        outside = 0.0 if len(self.values) == sum(len(t) for t in flat) else 1 / self.damping
        inside = seen * (1 / (self.values + self.damping) - outside)
        parts = (
            t * outside + v @ inside.to(device=v.device, dtype=v.dtype) for t, v in zip(flat, self.vectors, strict=True)
        )
        return tuple(p.reshape(t.shape).to(t.dtype) for p, t in zip(parts, vector, strict=True))


def _columns(system: LinearSystem, chosen: list[int]) -> list[Tensor]:
    """Return the chosen columns of H as one matrix for each parameter, in a dtype that decompositions have."""
    like = system.rhs
    matrices = [
        torch.empty(len(chosen), t.numel(), device=t.device, dtype=torch.promote_types(t.dtype, torch.float32))
        for t in like
    ]
    for i, unit in enumerate(_unit_vectors(like, chosen)):
        for matrix, column in zip(matrices, system.product(unit), strict=True):
            matrix[i] = column.reshape(-1)
    return [m.mT for m in matrices]


def _rows(columns: list[Tensor], chosen: list[int]) -> Tensor:
    """Return the rows of `columns` with the chosen numbers."""
    found, start = [], 0
    for part in columns:
        stop = start + len(part)
        local = torch.tensor([c - start for c in chosen if start <= c < stop], dtype=torch.long, device=part.device)
        found.append(_precise(part[local]))
        start = stop
    return torch.cat(found)


def _unit_vectors(like: Vector, chosen: list[int]) -> Iterator[Vector]:
    """Yield the unit vectors with the chosen numbers."""
    for number in chosen:
        unit, start = list(zeros_like(like)), 0
        for i, t in enumerate(like):
            if start <= number < start + t.numel():
                entries = torch.zeros(t.numel(), dtype=t.dtype, device=t.device)
                entries[number - start] = 1
                unit[i] = entries.reshape(t.shape)
            start += t.numel()
        yield tuple(unit)


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _precise(small: Tensor) -> Tensor:
    return small.cpu().double()
