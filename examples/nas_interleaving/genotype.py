"""`Genotype`: an architecture with its operations chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random

from torch import Tensor

from examples.nas_interleaving.operations import OPERATION_NAMES

#: One edge that is kept: (operation, index of the state that it reads). States 0 and 1 are the outputs of
#: the two cells before, state i + 2 is intermediate node i.
Edge = tuple[str, int]
#: For each intermediate node its two edges.
Cell = tuple[tuple[Edge, Edge], ...]

CELL_KINDS = ("normal", "reduction")
_SKIP = OPERATION_NAMES.index("skip_connect")
_CHOICES = tuple(name for name in OPERATION_NAMES if name != "none")


def edge_count(nodes: int) -> int:
    """Return the number of edges of a cell in which node i reads the two inputs and all earlier nodes."""
    return sum(2 + i for i in range(nodes))


@dataclass(frozen=True)
class Genotype:
    """The two cells of a network."""

    normal: Cell
    reduction: Cell

    @property
    def nodes(self) -> int:
        """Number of intermediate nodes of a cell."""
        return len(self.normal)

    @classmethod
    def decode(cls, weights: Mapping[str, Tensor], max_skips: int | None = None) -> Genotype:
        """Keep, for each node, the two edges whose best operation other than "none" weighs most.

        Args:
            weights: for "normal" and "reduction" a (edges, operations) tensor, rows ordered by node, then by input.
            max_skips: most skip connections of the normal cell, as in P-DARTS (Chen et al., ICCV 2019, section 3.3):
                the lightest one loses its weight and the cell is decoded anew, until there are no more than these.

        """
        rows = {kind: weights[kind].tolist() for kind in CELL_KINDS}
        normal = _decoded(rows["normal"])
        while max_skips is not None and len(skips := _skips(normal)) > max_skips:
            _, lightest = min((rows["normal"][row][_SKIP], row) for row in skips)
            rows["normal"][lightest][_SKIP] = -1.0
            normal = _decoded(rows["normal"])
        return cls(normal, _decoded(rows["reduction"]))

    @classmethod
    def random(cls, nodes: int, seed: int) -> Genotype:
        """Draw two different inputs for each node and an operation for each, all with equal probability."""
        draw = Random(seed)
        cells = {}
        for kind in CELL_KINDS:
            chosen = []
            for i in range(nodes):
                first, second = sorted(draw.sample(range(2 + i), 2))
                chosen.append(((draw.choice(_CHOICES), first), (draw.choice(_CHOICES), second)))
            cells[kind] = tuple(chosen)
        return cls(**cells)

    def to_json(self) -> str:
        """Return the genotype as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Read a genotype, and check it.

        Raises:
            ValueError: it is not a genotype; the message says where.

        """
        found = json.loads(text)
        if not isinstance(found, dict) or set(found) != set(CELL_KINDS):
            raise ValueError(f"a genotype has the entries {', '.join(CELL_KINDS)}; got {found!r:.100}.")
        cells = {kind: _checked(kind, found[kind]) for kind in CELL_KINDS}
        if len(cells["normal"]) != len(cells["reduction"]):
            raise ValueError("a genotype has as many nodes in the normal cell as in the reduction cell.")
        return cls(**cells)


def _skips(cell: Cell) -> list[int]:
    """Return the rows of the edges that are skip connections."""
    return [
        edge_count(node) + state for node, edges in enumerate(cell) for name, state in edges if name == "skip_connect"
    ]


def _decoded(rows: Sequence[Sequence[float]]) -> Cell:
    cell = []
    start, node = 0, 0
    while start < len(rows):
        best: list[tuple[float, Edge]] = []
        for state, row in enumerate(rows[start : start + 2 + node]):
            weight, name = max((w, n) for w, n in zip(row, OPERATION_NAMES, strict=True) if n != "none")
            best.append((weight, (name, state)))
        kept = sorted(best, key=lambda candidate: -candidate[0])[:2]
        first, second = sorted((edge for _, edge in kept), key=lambda edge: edge[1])
        cell.append((first, second))
        start, node = start + 2 + node, node + 1
    return tuple(cell)


def _checked(kind: str, nodes: object) -> Cell:
    if not isinstance(nodes, list) or not nodes:
        raise ValueError(f"genotype, {kind}: expected a list of nodes, got {nodes!r:.100}.")
    cell = []
    for i, edges in enumerate(nodes):
        where = f"genotype, {kind}, node {i}"
        if not isinstance(edges, list) or len(edges) != 2:
            raise ValueError(f"{where}: expected two edges, got {edges!r:.100}.")
        for edge in edges:
            if not isinstance(edge, list) or len(edge) != 2:
                raise ValueError(f"{where}: expected [operation, state], got {edge!r:.100}.")
            if edge[0] not in _CHOICES:
                raise ValueError(f"{where}: unknown operation {edge[0]!r}; expected one of {', '.join(_CHOICES)}.")
            if edge[1] not in range(2 + i):
                raise ValueError(f"{where}: expected a state from 0 to {1 + i}, got {edge[1]!r}.")
        first, second = ((str(name), int(state)) for name, state in edges)
        cell.append((first, second))
    return tuple(cell)
