"""The search space of the packaged example: operations, cells, genotypes."""

import json

import pytest
import torch
from torch import nn

from examples.nas_interleaving.genotype import Genotype, edge_count
from examples.nas_interleaving.macro import reductions
from examples.nas_interleaving.network import DerivedCell, Network
from examples.nas_interleaving.operations import OPERATION_NAMES, OPERATIONS
from examples.nas_interleaving.spaces import Architecture, edge_weights, search_space
from examples.nas_interleaving.stems import make_stem
from examples.nas_interleaving.supernet import Encoder, Learner, MixedCell

CHANNELS, EDGES = 4, 3
WITH_WEIGHTS = [name for name in OPERATION_NAMES if "conv" in name]


def _take_edge(single: nn.Module, batched: nn.Module, edge: int) -> None:
    """Give a module for one edge the weights of edge number `edge` of a batched one."""
    with torch.no_grad():
        for a, b in zip(single.parameters(), batched.parameters(), strict=True):
            a.copy_(b[edge * len(a) : (edge + 1) * len(a)])


@pytest.mark.parametrize("size", [8, 7, 1])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", [name for name in OPERATION_NAMES if name != "none"])
def test_batched_edges_are_one_module_per_edge(name, stride, size):
    batched = OPERATIONS[name](CHANNELS, stride, EDGES, True)
    x = torch.randn(5, CHANNELS, size, size)
    out = batched(x)
    assert out.shape[1] in (1, EDGES)
    assert out.shape[2:] == (CHANNELS, -(-size // stride), -(-size // stride))
    for edge in range(EDGES):
        single = OPERATIONS[name](CHANNELS, stride, 1, True)
        _take_edge(single, batched, edge)
        torch.testing.assert_close(single(x)[:, 0], out[:, min(edge, out.shape[1] - 1)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", [False, True])
def test_a_mixed_cell_is_the_weighted_sum_that_darts_defines(reduction):
    nodes = 4
    cell = MixedCell(search_space("darts", nodes), CHANNELS, reduction)
    weights = torch.rand(edge_count(nodes), len(OPERATION_NAMES))
    s0, s1 = torch.randn(2, 3, CHANNELS, 6, 6)
    states, row = [s0, s1], 0
    for node in range(nodes):
        total = 0
        for state in range(2 + node):
            column = node - max(0, state - 1)  # which of the edges leaving `state` this is
            for name, operation in cell.edges[state].operations.items():
                out = operation(states[state])
                out = out[:, min(column, out.shape[1] - 1)]
                total = total + weights[row, OPERATION_NAMES.index(name)] * out
            row += 1
        states.append(total)
    expected = torch.cat(states[2:], 1)
    kind = "reduction" if reduction else "normal"
    torch.testing.assert_close(cell(s0, s1, {kind: weights}), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", [False, True])
def test_a_supernet_with_all_weight_on_a_genotype_is_the_network_of_the_genotype(reduction):
    # Pooling is left out: it is normalised in a supernet only.
    cell = (
        (("sep_conv_3x3", 0), ("dil_conv_5x5", 1)),
        (("skip_connect", 0), ("sep_conv_5x5", 2)),
        (("dil_conv_3x3", 1), ("skip_connect", 3)),
    )
    nodes = len(cell)
    mixed = MixedCell(search_space("darts", nodes), CHANNELS, reduction)
    derived = DerivedCell(cell, CHANNELS, reduction)
    weights = torch.zeros(edge_count(nodes), len(OPERATION_NAMES))
    operations = iter(derived.operations)
    for node, edges in enumerate(cell):
        for name, state in edges:
            weights[edge_count(node) + state, OPERATION_NAMES.index(name)] = 1.0
            target, source = next(operations), mixed.edges[state].operations[name]
            for own, given in _convolutions(target, source):
                edge = node - max(0, state - 1)
                own.weight.data.copy_(given.weight[edge * len(own.weight) : (edge + 1) * len(own.weight)])
    s0, s1 = torch.randn(2, 3, CHANNELS, 6, 6)
    kind = "reduction" if reduction else "normal"
    torch.testing.assert_close(mixed(s0, s1, {kind: weights}), derived(s0, s1), rtol=1e-12, atol=1e-12)


def _convolutions(a: nn.Module, b: nn.Module) -> zip:
    found = ([m for m in module.modules() if isinstance(m, nn.Conv2d)] for module in (a, b))
    return zip(*found, strict=True)


@pytest.mark.parametrize(("cells", "expected"), [(2, {1}), (3, {1, 2}), (8, {2, 5}), (20, {6, 13})])
def test_reduction_cells_stand_at_one_and_two_thirds(cells, expected):
    assert reductions(cells) == expected


@pytest.mark.parametrize("cells", [2, 3, 5])
def test_networks_of_every_depth_run(cells):
    shape, space = (3, 9, 9), search_space("darts", 2)
    stem = make_stem("auto", shape, 2, derived=False)
    learner = Learner(stem, Encoder(space, stem.width, 2, cells), 5)
    logits = dict(Architecture(space).named_parameters())
    scores = learner(torch.randn(4, *shape), logits)
    assert scores.shape == (4, 5)
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in logits.values())
    assert Network(Genotype.random(2, 0), shape, 2, cells, 5)(torch.randn(4, *shape)).shape == (4, 5)


def test_edge_weights_are_the_softmax_over_operations():
    logits = {"normal": torch.randn(2, 8), "reduction": torch.randn(2, 8)}
    expected = logits["normal"].exp() / logits["normal"].exp().sum(1, keepdim=True)
    torch.testing.assert_close(edge_weights(search_space("darts", 1), logits)["normal"], expected, rtol=1e-12, atol=0)


def test_decoding_keeps_two_edges_and_never_none():
    rows = torch.full((5, 8), 0.01)
    none, skip, sep3 = (OPERATION_NAMES.index(n) for n in ("none", "skip_connect", "sep_conv_3x3"))
    rows[:, none] = 0.9  # the heaviest everywhere, and yet no choice
    rows[0, skip], rows[1, sep3] = 0.2, 0.1  # node 0 has two edges only
    rows[2, sep3], rows[3, sep3], rows[4, skip] = 0.05, 0.3, 0.4  # node 1 reads state 1 and node 0
    found = Genotype.decode({"normal": rows, "reduction": rows})
    assert found.normal == (
        (("skip_connect", 0), ("sep_conv_3x3", 1)),
        (("sep_conv_3x3", 1), ("skip_connect", 2)),
    )


def test_genotypes_travel_as_json():
    genotype = Genotype.random(4, 7)
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert Genotype.random(4, 7) == genotype != Genotype.random(4, 8)


def test_random_genotypes_are_valid_and_use_every_operation():
    names = set()
    for seed in range(60):
        genotype = Genotype.random(4, seed)
        for cell in (genotype.normal, genotype.reduction):
            for node, (a, b) in enumerate(cell):
                assert 0 <= a[1] < b[1] < 2 + node
                names |= {a[0], b[0]}
    assert names == set(OPERATION_NAMES) - {"none"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("normal"), "has the entries normal, reduction"),
        (lambda g: g["normal"].pop(), "as many nodes"),
        (lambda g: g["normal"][0].pop(), "node 0: expected two edges"),
        (lambda g: g["normal"][1][0].__setitem__(0, "none"), "unknown operation 'none'"),
        (lambda g: g["normal"][1][0].__setitem__(1, 3), "a state from 0 to 2, got 3"),
    ],
)
def test_a_broken_genotype_is_refused(change, message):
    broken = json.loads(Genotype.random(2, 0).to_json())
    change(broken)
    with pytest.raises(ValueError, match=message):
        Genotype.from_json(json.dumps(broken))
