"""The network in which every operation of every edge is present, weighted by the architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.nas_interleaving.genotype import edge_count
from examples.nas_interleaving.macro import Macro
from examples.nas_interleaving.operations import OPERATION_NAMES, OPERATIONS, Identity
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.spaces import SearchSpace, edge_weights


class MixedEdges(nn.Module):
    """All edges that leave one state: each the weighted sum of the operations on it.

    Args:
        channels: channels of the state.
        stride: 1 or 2.
        candidates: the operations of each edge.
        partial_channels: k; the operations see the first 1/k of the channels, and the others pass by (max-pooled
            where the stride is 2), weighted by the sum of the edge's weights.

    """

    def __init__(
        self, channels: int, stride: int, candidates: Sequence[Sequence[str]], partial_channels: int = 1
    ) -> None:
        super().__init__()
        self._stride, self._inside = stride, channels // partial_channels
        self._edges = {
            name: [edge for edge, names in enumerate(candidates) if name in names]
            for name, make in OPERATIONS.items()
            if make is not None
        }
        self.operations = nn.ModuleDict()
        for name, edges in self._edges.items():
            make = OPERATIONS[name]
            if edges and make is not None:
                self.operations[name] = make(self._inside, stride, len(edges), False)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return (N, edges, C, H', W') for weights of shape (edges, operations)."""
        mixed = self._mixed(x[:, : self._inside], weights)
        past = x[:, self._inside :]
        if past.shape[1] == 0:
            return mixed
        if self._stride == 2:
            past = F.max_pool2d(past, 2, ceil_mode=True)
        return torch.cat([mixed, _spread(weights.sum(dim=1)) * past.unsqueeze(1)], dim=2)

    def _mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        total = None
        for name, run in self.operations.items():
            edges, column = self._edges[name], weights[:, OPERATION_NAMES.index(name)]
            if len(edges) == len(weights):
                term = _spread(column) * run(x)
                total = term if total is None else total + term
            else:
                # Out of place: the sum so far may be needed for the gradient of an operation.
                index = torch.tensor(edges, device=x.device)
                term = _spread(column[index]) * run(x)
                total = term.new_zeros(self._shape(x, len(weights))) if total is None else total
                total = total.index_add(1, index, term)
        return x.new_zeros(self._shape(x, len(weights))) if total is None else total

    def _shape(self, x: Tensor, edges: int) -> tuple[int, ...]:
        count, channels, height, width = x.shape
        return count, edges, channels, -(-height // self._stride), -(-width // self._stride)


def _spread(weights: Tensor) -> Tensor:
    return weights.view(1, -1, 1, 1, 1)


class MixedCell(nn.Module):
    """The intermediate nodes of a cell, each the sum of its edges from all states before it.

    With partial channels, those of each node are shuffled, so that all of them meet an operation in time. The
    shuffle is the same for every edge into a node, so it is done once, after the sum.
    """

    def __init__(self, space: SearchSpace, channels: int, reduction: bool) -> None:
        super().__init__()
        self.kind = "reduction" if reduction else "normal"
        self.space = space
        nodes = space.nodes
        first_row = [edge_count(i) for i in range(nodes)]
        self._targets = [range(max(0, state - 1), nodes) for state in range(nodes + 1)]
        self._rows = [[first_row[node] + state for node in nodes_] for state, nodes_ in enumerate(self._targets)]
        candidates = space.candidates(self.kind)
        self.edges = nn.ModuleList(
            MixedEdges(
                channels,
                2 if reduction and state < 2 else 1,
                [candidates[row] for row in rows],
                space.partial_channels,
            )
            for state, rows in enumerate(self._rows)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the intermediate nodes side by side, (N, nodes·C, H', W')."""
        states: list[Tensor] = [s0, s1]
        sums: list[Tensor | None] = [None] * self.space.nodes
        for state, edges in enumerate(self.edges):
            out = edges(states[state], weights[self.kind][self._rows[state]])
            for node, term in zip(self._targets[state], out.unbind(1), strict=True):
                before = sums[node]
                sums[node] = term if before is None else before + term
            if state >= 1:  # node state − 1 has now heard all that it reads
                done = sums[state - 1]
                assert done is not None
                states.append(self._shuffled(done))
        return torch.cat(states[2:], dim=1)

    def _shuffled(self, x: Tensor) -> Tensor:
        if self.space.partial_channels == 1:
            return x
        return x.unflatten(1, (self.space.partial_channels, -1)).transpose(1, 2).flatten(1, 2)


class Encoder(nn.Module):
    """The shared encoder as a supernet: all cells, and what is between them.

    Args:
        space: the candidates of every edge.
        width: channels of the second output of the stems.
        channels: channels of a node in the first cell.
        cells: number of cells.

    Raises:
        SettingsError: the channels cannot be divided by k.

    """

    def __init__(self, space: SearchSpace, width: int, channels: int, cells: int) -> None:
        super().__init__()
        if channels % space.partial_channels:
            raise SettingsError(
                f"channels = {channels}: expected a multiple of partial_channels = {space.partial_channels}."
            )
        self.space = space
        self.macro = Macro(
            width,
            channels,
            cells,
            space.nodes,
            lambda c, reduction: MixedCell(space, c, reduction),
            derived=False,
        )
        self.features = self.macro.features

    def set_skip_dropout(self, rate: float) -> None:
        """Drop this share of every skip connection of stride 1 from now on, while training.

        Raises:
            SettingsError: it is not from 0 up to 1, without 1.

        """
        if not 0 <= rate < 1:
            raise SettingsError(f"skip_dropout = {rate}: expected a number from 0 up to 1, without 1.")
        for module in self.modules():
            if isinstance(module, Identity):
                module.dropout = rate

    def forward(self, s0: Tensor, s1: Tensor, logits: Mapping[str, Tensor]) -> Tensor:
        """Return (N, features) of what a stem returns, and the architecture's parameters."""
        last, _ = self.macro(s0, s1, edge_weights(self.space, logits))
        return last.mean(dim=(2, 3))


class Learner(nn.Module):
    """One stage's network: the encoder W, between a stem and a head of its task's own."""

    def __init__(self, stem: nn.Module, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.encoder = encoder
        self.head = nn.Linear(encoder.features, classes)

    def forward(self, images: Tensor, logits: Mapping[str, Tensor]) -> Tensor:
        """Return class scores, (N, classes), under the parameters of an `Architecture`."""
        return self.head(self.encoder(*self.stem(images), logits))
