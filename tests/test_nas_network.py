"""The search space of the packaged example: operations, cells, genotypes."""

import json
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import nn

from examples.nas_interleaving.genotype import Genotype, edge_count
from examples.nas_interleaving.macro import reductions
from examples.nas_interleaving.network import DerivedCell, Network
from examples.nas_interleaving.operations import OPERATION_NAMES, OPERATIONS, Identity
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.spaces import Architecture, edge_weights, search_space
from examples.nas_interleaving.stems import make_stem
from examples.nas_interleaving.supernet import Encoder, Learner, MixedCell, MixedEdges

CHANNELS, EDGES = 4, 3
WIDTH = 8  # of mixed cells, so that a quarter of it can be reduced
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


def _edge(cell, state, column, name):
    """Return one edge's operation of a cell as a module of its own."""
    edges, stride = cell.edges[state], 2 if cell.kind == "reduction" and state < 2 else 1
    batched = edges.operations[name]
    having = [edge for edge, names in enumerate(_candidates(cell, state)) if name in names]
    width = WIDTH // cell.space.partial_channels
    single = OPERATIONS[name](width, stride, 1, False)
    _take_edge(single, batched, having.index(column))
    return single


def _candidates(cell, state):
    """Return the candidates of all edges that leave a state, by the definition: node i reads states 0 to i + 1."""
    rows = cell.space.candidates(cell.kind)
    nodes = [node for node in range(cell.space.nodes) if state < 2 + node]
    return [rows[sum(2 + i for i in range(node)) + state] for node in nodes]


def _written_plainly(cell, s0, s1, alpha, beta):
    """Sum over the edges into each node as the papers write it: DARTS, equation 2; PC-DARTS, equations 2 and 4."""
    k, states, row = cell.space.partial_channels, [s0, s1], 0
    for node in range(cell.space.nodes):
        logits = beta[row : row + 2 + node]
        total = 0
        for state in range(2 + node):
            candidates = cell.space.candidates(cell.kind)[row]
            scale = sum(alpha[row, OPERATION_NAMES.index(name)].exp() for name in candidates)
            x = states[state]
            inside, past = x[:, : WIDTH // k], x[:, WIDTH // k :]
            stride = 2 if cell.kind == "reduction" and state < 2 else 1
            if k > 1:
                past = past.unflatten(2, (-1, stride)).unflatten(4, (-1, stride)).amax((3, 5))
            mixed = torch.zeros(len(x), WIDTH // k, x.shape[2] // stride, x.shape[3] // stride)
            for name in candidates:
                if name != "none":
                    weight = alpha[row, OPERATION_NAMES.index(name)].exp() / scale
                    single = _edge(cell, state, node - max(0, state - 1), name)
                    mixed = mixed + weight * single(inside)[:, 0]
            edge = torch.cat([mixed, past], 1) if k > 1 else mixed
            shuffled = torch.stack([edge[:, i // k + (i % k) * (WIDTH // k)] for i in range(WIDTH)], 1)
            normalised = logits[state].exp() / logits.exp().sum() if cell.space.edge_normalisation else 1.0
            total = total + normalised * shuffled
            row += 1
        states.append(total)
    return torch.cat(states[2:], 1)


def _uneven(space):
    """Return the space with other operations on each edge, with one edge that has none and one that has all."""
    draw = Random(1)

    def some():
        rows = [
            tuple(sorted(draw.sample(OPERATION_NAMES, draw.randint(1, 6)), key=OPERATION_NAMES.index))
            for _ in space.normal
        ]
        return (("none",), OPERATION_NAMES, *rows[2:])

    return replace(space, normal=some(), reduction=some())


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("space", [("darts", 1), ("darts", 2), ("pc-darts", 1), ("pc-darts", 4)])
@pytest.mark.parametrize("reduction", [False, True])
def test_a_mixed_cell_is_what_the_papers_define(reduction, space, uneven):
    space = search_space(space[0], 4, space[1])
    space = _uneven(space) if uneven else space
    kind = "reduction" if reduction else "normal"
    cell = MixedCell(space, WIDTH, reduction)
    logits = {name: torch.randn_like(p) for name, p in Architecture(space).named_parameters()}
    s0, s1 = torch.randn(2, 3, WIDTH, 6, 6)
    beta = logits.get(f"{kind}_edges", torch.zeros(edge_count(4)))
    expected = _written_plainly(cell, s0, s1, logits[kind], beta)
    torch.testing.assert_close(cell(s0, s1, edge_weights(space, logits)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("space", ["darts", "pc-darts"])
def test_an_uneven_cell_runs_in_lower_precision(space):
    space = _uneven(search_space(space, 4))
    cell, weights = MixedCell(space, WIDTH, True).float(), Architecture(space).float().weights()
    s0, s1 = torch.randn(2, 3, WIDTH, 6, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = cell(s0.bfloat16(), s1.bfloat16(), weights)
    torch.testing.assert_close(low.float(), cell(s0, s1, weights), rtol=0.1, atol=0.1)


def test_a_state_all_of_whose_edges_are_absent_gives_nothing():
    edges = MixedEdges(4, 2, [("none",), ("none",)])
    assert torch.equal(edges(torch.randn(3, 4, 5, 7), torch.rand(2, 8)), torch.zeros(3, 2, 4, 3, 4))


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


def test_edges_are_weighed_against_those_into_the_same_node():
    space = search_space("pc-darts", 2)
    logits = {name: torch.randn_like(p) for name, p in Architecture(space).named_parameters()}
    assert set(logits) == {"normal", "reduction", "normal_edges", "reduction_edges"}
    for kind in ("normal", "reduction"):
        beta = logits[f"{kind}_edges"].exp()
        sums = torch.stack([beta[0] + beta[1]] * 2 + [beta[2] + beta[3] + beta[4]] * 3)
        found = edge_weights(space, logits)[kind]
        torch.testing.assert_close(found.sum(1), beta / sums, rtol=1e-12, atol=0)
        torch.testing.assert_close(found / found.sum(1, keepdim=True), logits[kind].softmax(1), rtol=1e-12, atol=0)


def test_a_heavy_operation_on_a_light_edge_is_not_decoded():
    space, sep3, skip = search_space("pc-darts", 2), *map(OPERATION_NAMES.index, ("sep_conv_3x3", "skip_connect"))
    logits = {name: torch.zeros_like(p) for name, p in Architecture(space).named_parameters()}
    logits["normal"][:, sep3] = 1.0
    logits["normal"][2, skip], logits["normal_edges"][2] = 3.0, -5.0
    assert Genotype.decode(edge_weights(space, logits)).normal[1] == (("sep_conv_3x3", 1), ("sep_conv_3x3", 2))


def test_shrinking_keeps_the_heaviest_operations_and_their_softmax():
    space = search_space("darts", 2)
    logits = {name: torch.randn_like(p) for name, p in Architecture(space).named_parameters()}
    for keep in (5, 3, 1):
        space = space.shrunk(edge_weights(space, logits), keep)
        for kind in ("normal", "reduction"):
            weights = edge_weights(space, logits)[kind]
            for row, (candidates, logit) in enumerate(zip(space.candidates(kind), logits[kind], strict=True)):
                best = logit.argsort(descending=True)[:keep].tolist()
                assert candidates == tuple(OPERATION_NAMES[i] for i in sorted(best))
                expected = torch.zeros(8).index_put((torch.tensor(best),), logit[best].softmax(0))
                torch.testing.assert_close(weights[row], expected, rtol=1e-12, atol=0)
    with pytest.raises(SettingsError, match="keep = 2: expected from 1 to 1"):
        space.shrunk(edge_weights(space, logits), 2)


def test_an_operation_that_is_gone_has_no_gradient_and_no_weights():
    space = search_space("darts", 2)
    whole, architecture = MixedCell(space, 4, True), Architecture(space)
    space = space.shrunk(architecture.weights(), 3)
    cell, architecture = MixedCell(space, 4, True), Architecture(space)
    cell(*torch.randn(2, 3, 4, 6, 6), architecture.weights()).square().sum().backward()
    for row, candidates in enumerate(space.reduction):
        for column, name in enumerate(OPERATION_NAMES):
            assert (architecture.reduction.grad[row, column] != 0) == (name in candidates)
    assert sum(p.numel() for p in cell.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("nasnet", {}, "space = 'nasnet': expected one of darts, pc-darts"),
        ("darts", {"nodes": 0}, "nodes = 0: expected an integer of at least 1"),
        ("pc-darts", {"partial_channels": 0}, "partial_channels = 0"),
    ],
)
def test_unknown_spaces_are_refused(name, values, message):
    with pytest.raises(SettingsError, match=message):
        search_space(name, **values)


def test_channels_that_cannot_be_divided_are_refused():
    with pytest.raises(SettingsError, match="channels = 6: expected a multiple of partial_channels = 4"):
        Encoder(search_space("pc-darts", 2), 18, 6, 2)


def test_one_encoder_serves_images_of_every_shape_and_size():
    space = search_space("pc-darts", 2)
    stems = [make_stem("auto", shape, 4, derived=False) for shape in ((1, 8, 8), (3, 13, 11), (3, 130, 128))]
    encoder = Encoder(space, stems[0].width, 4, 3)
    learners = [Learner(stem, encoder, classes) for stem, classes in zip(stems, (2, 3, 4), strict=True)]
    shared = {name for name, _ in learners[0].named_parameters() if name.startswith("encoder.")}
    for learner, images, classes in zip(
        learners,
        (torch.randn(2, 1, 8, 8), torch.randn(2, 3, 13, 11), torch.randn(2, 3, 130, 128)),
        (2, 3, 4),
        strict=True,
    ):
        assert learner(images, dict(Architecture(space).named_parameters())).shape == (2, classes)
        own = {name.partition(".")[0] for name, _ in learner.named_parameters()}
        assert own == {"stem", "encoder", "head"}
        assert {name for name, _ in learner.named_parameters() if name.startswith("encoder.")} == shared


def test_the_stem_of_imagenet_in_a_search_is_three_times_as_wide():
    first, second = make_stem("imagenet", (3, 224, 224), 4, derived=False)(torch.randn(1, 3, 224, 224))
    assert (first.shape, second.shape) == ((1, 4, 28, 28), (1, 12, 28, 28))


def test_skip_connections_drop_out_edge_by_edge_while_training():
    space = search_space("darts", 3)
    encoder = Encoder(space, 12, 4, 3)
    only_skips = {k: torch.full((edge_count(3), 8), -1e9) for k in ("normal", "reduction")}
    for logits in only_skips.values():
        logits[:, OPERATION_NAMES.index("skip_connect")] = 0.0
    given = torch.randn(2, 4, 6, 6), torch.randn(2, 12, 6, 6), only_skips
    plain = encoder(*given)
    encoder.set_skip_dropout(0.5)
    assert not torch.allclose(encoder(*given), plain)
    assert torch.equal(encoder.eval()(*given), plain)
    encoder.train().set_skip_dropout(0.0)
    assert torch.equal(encoder(*given), plain)
    skip = Identity(3)
    skip.dropout = 0.25
    out = skip(torch.ones(500, 4, 2, 2))
    assert out.shape == (500, 3, 4, 2, 2)
    assert set(out.unique().tolist()) == {0.0, 1 / 0.75}
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(out[:, 0], out[:, 1])
    with pytest.raises(SettingsError, match=r"skip_dropout = 1\.0: expected a number from 0 up to 1"):
        encoder.set_skip_dropout(1.0)


def test_decoding_gives_up_the_lightest_skip_connections_of_the_normal_cell():
    none, skip, sep3, sep5 = map(OPERATION_NAMES.index, ("none", "skip_connect", "sep_conv_3x3", "sep_conv_5x5"))
    rows = torch.full((5, 8), 0.01)
    rows[:, none], rows[:, skip] = 0.9, torch.tensor([0.5, 0.3, 0.4, 0.2, 0.1])
    rows[:, sep3] = torch.tensor([0.0, 0.2, 0.25, 0.15, 0.05])
    rows[1, sep5] = 0.25
    weights = {"normal": rows, "reduction": rows}
    skips = (("skip_connect", 0), ("skip_connect", 1))
    assert Genotype.decode(weights).normal == (skips, skips)
    # The skip of weight 0.2 (node 1, state 1) goes first: its edge is now worth 0.15, still more than 0.1.
    three = Genotype.decode(weights, max_skips=3)
    assert three.normal == (skips, (("skip_connect", 0), ("sep_conv_3x3", 1)))
    # Then that of 0.3, on an edge that node 0 cannot do without.
    two = Genotype.decode(weights, max_skips=2)
    assert two.normal == ((("skip_connect", 0), ("sep_conv_5x5", 1)), (("skip_connect", 0), ("sep_conv_3x3", 1)))
    assert two.reduction == (skips, skips), "the reduction cell keeps its own"
    assert "skip_connect" not in str(Genotype.decode(weights, max_skips=0).normal)
    torch.testing.assert_close(rows[1, skip].item(), 0.3)


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
