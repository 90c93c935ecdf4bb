"""The network in which every operation of every edge is present, weighted by the architecture."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from examples.nas_interleaving.genotype import CELL_KINDS, edge_count
from examples.nas_interleaving.macro import Macro
from examples.nas_interleaving.operations import OPERATION_NAMES, OPERATIONS


class Architecture(nn.Module):
    """The architecture parameters α: a logit for each operation of each edge, in a normal and a reduction cell."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        for kind in CELL_KINDS:
            start = 1e-3 * torch.randn(edge_count(nodes), len(OPERATION_NAMES))
            self.register_parameter(kind, nn.Parameter(start))


def edge_weights(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of all operations: the softmax over the operations of each edge."""
    return {kind: logits[kind].softmax(dim=-1) for kind in CELL_KINDS}


class MixedEdges(nn.Module):
    """All edges that leave one state: each the weighted sum of all operations on it."""

    def __init__(self, channels: int, stride: int, edges: int) -> None:
        super().__init__()
        made = {name: make(channels, stride, edges, False) for name, make in OPERATIONS.items() if make is not None}
        self.operations = nn.ModuleDict(made)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return (N, edges, C, H', W') for weights of shape (edges, operations)."""
        by_operation = dict(zip(OPERATION_NAMES, weights.t(), strict=True))
        terms = [by_operation[name].view(1, -1, 1, 1, 1) * run(x) for name, run in self.operations.items()]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


class MixedCell(nn.Module):
    """The intermediate nodes of a cell, each the sum of its edges from all states before it."""

    def __init__(self, nodes: int, channels: int, reduction: bool) -> None:
        super().__init__()
        self.kind = "reduction" if reduction else "normal"
        self._nodes = nodes
        first_row = [edge_count(i) for i in range(nodes)]
        self._targets = [range(max(0, state - 1), nodes) for state in range(nodes + 1)]
        self._rows = [[first_row[node] + state for node in nodes_] for state, nodes_ in enumerate(self._targets)]
        self.edges = nn.ModuleList(
            MixedEdges(channels, 2 if reduction and state < 2 else 1, len(nodes_))
            for state, nodes_ in enumerate(self._targets)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the intermediate nodes side by side, (N, nodes·C, H', W')."""
        states: list[Tensor] = [s0, s1]
        sums: list[Tensor | None] = [None] * self._nodes
        for state, edges in enumerate(self.edges):
            out = edges(states[state], weights[self.kind][self._rows[state]])
            for node, term in zip(self._targets[state], out.unbind(1), strict=True):
                before = sums[node]
                sums[node] = term if before is None else before + term
            if state >= 1:  # node state − 1 has now heard all that it reads
                done = sums[state - 1]
                assert done is not None
                states.append(done)
        return torch.cat(states[2:], dim=1)


class Encoder(nn.Module):
    """The shared encoder as a supernet: images and architecture logits → features."""

    def __init__(self, image_channels: int, channels: int, cells: int, nodes: int) -> None:
        super().__init__()
        self.macro = Macro(
            image_channels, channels, cells, nodes, lambda c, reduction: MixedCell(nodes, c, reduction), derived=False
        )
        self.features = self.macro.features

    def forward(self, images: Tensor, logits: Mapping[str, Tensor]) -> Tensor:
        """Return (N, features)."""
        return self.macro(images, edge_weights(logits))


class Learner(nn.Module):
    """One stage's network: an encoder W and a head H of its own."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.features, classes)

    def forward(self, images: Tensor, logits: Mapping[str, Tensor]) -> Tensor:
        """Return class scores, (N, classes)."""
        return self.head(self.encoder(images, logits))
