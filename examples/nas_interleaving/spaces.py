"""`SearchSpace`: which architectures a search chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from examples.nas_interleaving.genotype import CELL_KINDS, edge_count
from examples.nas_interleaving.operations import OPERATION_NAMES
from examples.nas_interleaving.options import SettingsError

#: For each edge of a cell (rows ordered by node, then by input) the operations that it chooses from.
Candidates = tuple[tuple[str, ...], ...]

#: name → the part 1/k of the channels that goes through the operations, unless told otherwise.
SPACES = {"darts": 1, "pc-darts": 4}


@dataclass(frozen=True)
class SearchSpace:
    """The cells of a search; made by `search_space`.

    Attributes:
        name: "darts" (Liu, Simonyan and Yang, ICLR 2019), or "pc-darts" (Xu et al., ICLR 2020), in which a
            weight β of each edge, normalised over the edges into a node, joins the weights α of its operations.
        nodes: intermediate nodes of a cell.
        partial_channels: k; of a node's channels, 1/k go through the operations and the others past them.
        normal: the candidates of a normal cell.
        reduction: the candidates of a reduction cell.

    """

    name: str
    nodes: int
    partial_channels: int
    normal: Candidates
    reduction: Candidates

    @property
    def edge_normalisation(self) -> bool:
        """Whether edges have weights of their own."""
        return self.name == "pc-darts"

    def candidates(self, kind: str) -> Candidates:
        """Return the operations that each edge of a "normal" or "reduction" cell chooses from."""
        return {"normal": self.normal, "reduction": self.reduction}[kind]

    def shrunk(self, weights: Mapping[str, Tensor], keep: int) -> SearchSpace:
        """Keep the heaviest operations of each edge: a step of P-DARTS (Chen et al., ICCV 2019).

        Args:
            weights: for "normal" and "reduction" a (edges, operations) tensor, as `edge_weights` returns them.
            keep: how many operations each edge keeps; "none" counts as one.

        Raises:
            SettingsError: an edge has fewer than `keep` operations.

        """
        normal, reduction = (self._heaviest(kind, weights[kind].tolist(), keep) for kind in CELL_KINDS)
        return replace(self, normal=normal, reduction=reduction)

    def _heaviest(self, kind: str, rows: Sequence[Sequence[float]], keep: int) -> Candidates:
        kept = []
        for candidates, row in zip(self.candidates(kind), rows, strict=True):
            if not 1 <= keep <= len(candidates):
                raise SettingsError(f"keep = {keep}: expected from 1 to {len(candidates)}, the operations of an edge.")
            weight = dict(zip(OPERATION_NAMES, row, strict=True))
            best = sorted(candidates, key=lambda name: -weight[name])[:keep]
            kept.append(tuple(name for name in candidates if name in best))
        return tuple(kept)


def search_space(name: str, nodes: int = 4, partial_channels: int | None = None) -> SearchSpace:
    """Return a whole search space.

    Args:
        name: "darts" or "pc-darts".
        nodes: intermediate nodes of a cell.
        partial_channels: k; 1 lets all channels through the operations. By default 1 for "darts" and 4 for
            "pc-darts" (the papers' own).

    Raises:
        SettingsError: one of them is out of range.

    """
    if name not in SPACES:
        raise SettingsError(f"space = {name!r}: expected one of {', '.join(SPACES)}.")
    k = SPACES[name] if partial_channels is None else partial_channels
    for option, value in (("nodes", nodes), ("partial_channels", k)):
        if value < 1:
            raise SettingsError(f"{option} = {value}: expected an integer of at least 1.")
    every = (OPERATION_NAMES,) * edge_count(nodes)
    return SearchSpace(name, nodes, k, every, every)


class Architecture(nn.Module):
    """The architecture parameters: logits, in a normal and in a reduction cell.

    `normal` and `reduction`, of shape (edges, operations), are α. With edge normalisation there are also
    `normal_edges` and `reduction_edges`, of shape (edges,): β. Logits of operations that a space has no more stay
    where they are, and have no effect.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        edges = edge_count(space.nodes)
        for kind in CELL_KINDS:
            self.register_parameter(kind, nn.Parameter(1e-3 * torch.randn(edges, len(OPERATION_NAMES))))
        if space.edge_normalisation:
            for kind in CELL_KINDS:
                self.register_parameter(_edges_of(kind), nn.Parameter(1e-3 * torch.randn(edges)))

    def weights(self) -> dict[str, Tensor]:
        """Return the `edge_weights` of these parameters."""
        return edge_weights(self.space, dict(self.named_parameters()))


def edge_weights(space: SearchSpace, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of all operations on all edges, for "normal" and "reduction" of shape (edges, operations).

    They are the softmax of α over the operations that an edge has left, 0 for all others; with edge normalisation
    times the softmax of β over the edges into a node. A row sums to the weight of its edge: 1, or that of β.
    """
    found = {}
    for kind in CELL_KINDS:
        weights = _masked(logits[kind], space.candidates(kind)).softmax(dim=-1)
        if space.edge_normalisation:
            by_node = logits[_edges_of(kind)].split([2 + node for node in range(space.nodes)])
            weights = weights * torch.cat([beta.softmax(dim=0) for beta in by_node]).unsqueeze(1)
        found[kind] = weights
    return found


def _edges_of(kind: str) -> str:
    return f"{kind}_edges"


def _masked(alpha: Tensor, candidates: Candidates) -> Tensor:
    if all(names == OPERATION_NAMES for names in candidates):
        return alpha
    gone = [[name not in names for name in OPERATION_NAMES] for names in candidates]
    return alpha.masked_fill(torch.tensor(gone, device=alpha.device), float("-inf"))
