"""The linear system of a stage solved with its explicit Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.errors import ConfigurationError
from mlo.hypergradient.implicit import ImplicitMethod, Solution
from mlo.linear_system import LinearSystem
from mlo.options import is_count
from mlo.status import Status
from mlo.vectors import Vector, zeros_like


@dataclass(frozen=True)
class Dense(ImplicitMethod):
    """Form H and solve H λ = c by elimination: the reference for small stages.

    Right for any non-singular H, indefinite or non-symmetric ones included. A singular H is reported, and
    the solution of least norm is what `on_breakdown="warn"` uses.

    Args:
        max_size: refuse stages of more parameters than this, whose Hessian would fill the memory.
        on_breakdown: see `HypergradientMethod`.

    Raises:
        ConfigurationError: max_size is no positive integer, or a stage has more parameters.

    Cost: n Hessian–vector products, one mixed product, memory for two n × n matrices, n the number of parameters, and
    O(n³) operations.

    Source: Bengio, "Gradient-based optimization of hyperparameters", Neural Computation 12, 2000.

    >>> import mlo, torch
    >>> def loss(w, x):                                   # indefinite: w*(x) = x / (1, −2)
    ...     return (torch.tensor([0.5, -1.0]) * w**2).sum() - (w * x).sum()
    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> w = mlo.best_response(loss, torch.tensor([3.0, -2.0]), x, mlo.Dense())
    >>> torch.autograd.grad(w.sum(), x)[0].tolist()
    [1.0, -0.5]

    """

    max_size: int = 5000

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not is_count(self.max_size):
            raise self.option_error("max_size", "an integer of at least 1")

    def solve(self, system: LinearSystem) -> Solution:
        """Return the solution of the dense system."""
        rhs = system.rhs
        size = sum(t.numel() for t in rhs)
        if size > self.max_size:
            raise ConfigurationError(
                f"Dense at stage {system.name!r}: {size} parameters make a Hessian of {size}² entries; expected at "
                f"most max_size={self.max_size}. Use ConjugateGradient, or raise max_size."
            )
        c = _joined(rhs)
        if not torch.isfinite(c).all():
            return Solution(rhs, Status.NON_FINITE, 0, None)
        matrix = torch.stack([_joined(system.product(unit)) for unit in _unit_vectors(rhs)], dim=1)
        if not torch.isfinite(matrix).all():
            return Solution(zeros_like(rhs), Status.NON_FINITE, size, None)
        singular_values = torch.linalg.svdvals(matrix)
        threshold = size * torch.finfo(matrix.dtype).eps * singular_values[0]
        if singular_values[-1] <= threshold:
            status, joined = Status.SINGULAR, torch.linalg.pinv(matrix, atol=threshold) @ c
        else:
            status, joined = Status.CONVERGED, torch.linalg.solve(matrix, c)
        length = torch.linalg.vector_norm(c)
        residual = (torch.linalg.vector_norm(c - matrix @ joined) / length).item() if length > 0 else 0.0
        return Solution(_separated(joined, rhs), status, size, residual)


def _joined(tensors: Vector) -> Tensor:
    """Return all entries in one vector, in the widest dtype among them and at least in float32."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.cat([t.reshape(-1).to(device=tensors[0].device, dtype=dtype) for t in tensors])


def _separated(joined: Tensor, like: Vector) -> Vector:
    parts = torch.split(joined, [t.numel() for t in like])
    return tuple(p.reshape(t.shape).to(device=t.device, dtype=t.dtype) for p, t in zip(parts, like, strict=True))


def _unit_vectors(like: Vector) -> Iterator[Vector]:
    for i, t in enumerate(like):
        for j in range(t.numel()):
            unit = list(zeros_like(like))
            entries = torch.zeros(t.numel(), dtype=t.dtype, device=t.device)
            entries[j] = 1
            unit[i] = entries.reshape(t.shape)
            yield tuple(unit)
