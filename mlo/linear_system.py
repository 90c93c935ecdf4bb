"""The linear system of a stage's implicit function theorem, as the solvers see it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mlo.products.base import Linearisation
from mlo.stage_function import StageFunction
from mlo.vectors import Vector, norm, zeros_like


class LinearSystem:
    """Hᵀ λ = c (or H λ = c) with H = ∂g/∂θ and g the stationarity equation of a stage.

    Parameters that the loss does not reach are left out: `rhs`, `product` and a solution hold one tensor for each
    parameter that takes part.

    Attributes:
        name: the stage's name.
        products: how many Hessian–vector products have been formed.
        gradient: g at the solution; `None` for parameters that the loss does not reach.
        rhs: the right-hand side c.

    """

    def __init__(
        self,
        stage: StageFunction,
        linearisation: Linearisation,
        solution: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        *,
        transposed: bool = False,
        warm_start_key: str | None = None,
        cotangent_norm: float | None = None,
    ) -> None:
        """Set up the system at a solution; `transposed` asks for H instead of Hᵀ, `cotangent_norm` may be known."""
        self.name = stage.name
        self.products = 0
        self.gradient = linearisation.gradient
        self._stage, self._linearisation, self._solution = stage, linearisation, tuple(solution)
        self.rhs = linearisation.taking_part(cotangents)
        self._rhs_norm = cotangent_norm if len(self.rhs) == len(cotangents) else None
        self._transposed = transposed
        self._warm_start_key = warm_start_key

    @property
    def rhs_norm(self) -> float:
        """The Euclidean norm ‖c‖ of the right-hand side."""
        return norm(self.rhs) if self._rhs_norm is None else self._rhs_norm

    @property
    def learning_rates(self) -> tuple[float, ...] | None:
        """The optimizer's learning rate for each tensor, or `None` without an optimizer."""
        rates = self._stage.learning_rates
        return None if rates is None else tuple(r for r, g in zip(rates, self.gradient, strict=True) if g is not None)

    @property
    def last_solution(self) -> Vector | None:
        """The solution of the same system at the step before, or `None`; what a warm start begins from."""
        store, key = self._stage.warm_starts, self._warm_start_key
        if store is None or key is None or key not in store:
            return None
        kept = store[key]
        if [t.shape for t in kept] != [t.shape for t in self._solution]:  # parameters were frozen or unfrozen since
            return None
        return self._linearisation.taking_part(kept)

    def keep(self, solution: Sequence[Tensor]) -> None:
        """Keep a solution for the warm start of the next step (nothing happens where none can follow)."""
        if self._stage.warm_starts is not None and self._warm_start_key is not None:
            self._stage.warm_starts[self._warm_start_key] = self.all_parameters(solution)

    def forget(self) -> None:
        """Drop the kept solution, so that the next step begins without one."""
        if self._stage.warm_starts is not None and self._warm_start_key is not None:
            self._stage.warm_starts.pop(self._warm_start_key, None)

    def product(self, vector: Sequence[Tensor]) -> Vector:
        """Return Hᵀ·vector (H·vector if the system is the transposed one)."""
        self.products += 1
        form = self._linearisation.transposed_product if self._transposed else self._linearisation.product
        return form(vector)

    def update_derivative(self) -> Vector:
        """Return the diagonal ∂(θ − θ⁺)/∂g of the optimizer's next step, for the gradient g of what it minimises.

        Raises:
            ConfigurationError: the stage has no optimizer, or one whose steps are not known.

        """
        part = self._linearisation.taking_part
        stage = self._stage
        raw = [
            None if g is None else sign * (g.detach() - decay * theta.detach())
            for g, theta, sign, decay in zip(
                self.gradient, self._solution, stage.signs, stage.weight_decays, strict=True
            )
        ]
        found = stage.update_derivative(raw)
        return part([sign * t for sign, t in zip(stage.signs, found, strict=True)])

    def all_parameters(self, vector: Sequence[Tensor]) -> Vector:
        """Return `vector` with zeros for the parameters that take no part."""
        given = iter(vector)
        zero = zeros_like(self._solution)
        return tuple(z if g is None else next(given) for g, z in zip(self.gradient, zero, strict=True))
