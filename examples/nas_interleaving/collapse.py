"""Signs that a search collapses, and when it is to end for them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.search_settings import SearchSettings

#: Validations over which eigenvalues are averaged, and after which averages are compared (Zela et al., section 5).
WINDOW = 5

_SEED = 0


def skip_connections(weights: Mapping[str, Tensor]) -> int:
    """Return how many edges of the normal cell that these weights decode to are skip connections."""
    return sum(name == "skip_connect" for node in Genotype.decode(weights).normal for name, _ in node)


def largest_eigenvalue(loss: Tensor, parameters: Sequence[Tensor], steps: int) -> float:
    """Return the largest eigenvalue of the Hessian of a loss in its parameters, by Lanczos' method.

    All vectors are kept and made orthogonal anew in each step. The result is at most the eigenvalue, and equal to it
    after as many steps as there are parameters.

    Args:
        loss: a scalar with its graph, twice differentiable.
        parameters: in which it is differentiated.
        steps: of Lanczos' method; at most the number of parameters is taken.

    Cost: one reverse pass with graph, and one per step through it.

    Source: Zela et al., "Understanding and robustifying differentiable architecture search", ICLR 2020, section 4,
    for what it tells of a search; Lanczos, 1950, for the method.

    """
    (*gradient,) = torch.autograd.grad(loss, parameters, create_graph=True)
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.cat([torch.randn(p.numel(), generator=generator, dtype=torch.float64) for p in parameters])
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, len(start))):
        image = _product(gradient, parameters, basis[-1])
        diagonal.append(float(basis[-1] @ image))
        for vector in basis * 2:  # twice is enough
            image = image - (vector @ image) * vector
        beside.append(float(image.norm()))
        if beside[-1] <= 1e-12 * max(map(abs, diagonal)):
            break
        basis.append(image / beside[-1])
    size = len(diagonal)
    tridiagonal = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        tridiagonal[i, i] = diagonal[i]
        if i + 1 < size:
            tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = beside[i]
    return float(torch.linalg.eigvalsh(tridiagonal)[-1])


def _product(gradient: Sequence[Tensor], parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Return the Hessian times a vector."""
    parts = vector.split([p.numel() for p in parameters])
    bent = [(g, v.to(g).view_as(g)) for g, v in zip(gradient, parts, strict=True) if g.requires_grad]
    outputs, vectors = [g for g, _ in bent], [v for _, v in bent]
    found = torch.autograd.grad(outputs, parameters, vectors, retain_graph=True, materialize_grads=True)
    return torch.cat([h.detach().flatten().double().cpu() for h in found])


class Watch:
    """Decides from the signs at each validation whether a search ends.

    It ends when the normal cell has `stop_on_skips` skip connections, or when the eigenvalue, averaged over five
    validations, has grown by `stop_on_eigenvalue` within five more (DARTS-ES ends at 1/0.75 and takes the architecture
    from before the growth).

    Attributes:
        reason: why the search ends, empty while it does not.
        step: after which step the architecture is to be taken.

    """

    def __init__(self, settings: SearchSettings) -> None:
        self._skips = settings.stop_on_skips
        self._growth = settings.stop_on_eigenvalue
        self._steps: list[int] = []
        self._eigenvalues: list[float] = []
        self.reason = ""
        self.step = 0

    def look(self, step: int, signs: Mapping[str, float]) -> bool:
        """Return whether the search ends, given the signs after a step."""
        if self._skips and signs["skip_connections"] >= self._skips:
            self.step = step
            self.reason = f"{signs['skip_connections']:.0f} skip connections in the normal cell"
        elif self._growth and self._has_grown(step, signs["eigenvalue"]):
            self.step = self._steps[-1 - WINDOW]
            self.reason = f"the eigenvalue has grown by {self._growth:g} since step {self.step}"
        return bool(self.reason)

    def _has_grown(self, step: int, eigenvalue: float) -> bool:
        self._steps.append(step)
        self._eigenvalues.append(eigenvalue)
        if len(self._eigenvalues) < 2 * WINDOW:
            return False
        before = statistics.fmean(self._eigenvalues[-2 * WINDOW : -WINDOW])
        return statistics.fmean(self._eigenvalues[-WINDOW:]) > self._growth * before > 0
