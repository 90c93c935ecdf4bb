"""The search space of the packaged example: operations, cells, genotypes, tasks."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from examples.nas_interleaving.genotype import Genotype, edge_count
from examples.nas_interleaving.interleaving import build_engine
from examples.nas_interleaving.macro import reductions
from examples.nas_interleaving.network import DerivedCell, Network
from examples.nas_interleaving.operations import OPERATION_NAMES, OPERATIONS
from examples.nas_interleaving.settings import SearchSettings
from examples.nas_interleaving.supernet import Architecture, Encoder, MixedCell, edge_weights
from examples.nas_interleaving.tasks import SideBySide, Task, TaskError, batches, check_compatible, load_tasks

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
    cell = MixedCell(nodes, CHANNELS, reduction)
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
    mixed, derived = MixedCell(nodes, CHANNELS, reduction), DerivedCell(cell, CHANNELS, reduction)
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
    encoder = Encoder(3, 2, cells, 2)
    logits = dict(Architecture(2).named_parameters())
    features = encoder(torch.randn(4, 3, 9, 9), logits)
    assert features.shape == (4, encoder.features)
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in logits.values())
    assert Network(Genotype.random(2, 0), 3, 2, cells, 5)(torch.randn(4, 3, 9, 9)).shape == (4, 5)


def test_edge_weights_are_the_softmax_over_operations():
    logits = {"normal": torch.randn(2, 8), "reduction": torch.randn(2, 8)}
    expected = logits["normal"].exp() / logits["normal"].exp().sum(1, keepdim=True)
    torch.testing.assert_close(edge_weights(logits)["normal"], expected, rtol=1e-12, atol=0)


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


def test_the_tasks_share_no_class_and_their_parts_no_image():
    first, second = load_tasks(["digits:0-4", "digits:5-9"])
    assert (first.classes, second.classes, first.image_shape) == (5, 5, (1, 8, 8))
    images = {}
    for task in (first, second):
        for part in ("train", "validation", "test"):
            data = getattr(task, part)
            assert {int(label) for _, label in data} == set(range(5))
            images[task.name, part] = {image.numpy().tobytes() for image, _ in data}
        # The digits hold few or no duplicates, so parts that overlapped would share many images.
        assert not images[task.name, "train"] & images[task.name, "validation"]
        assert not images[task.name, "test"] & (images[task.name, "train"] | images[task.name, "validation"])
        assert len(task.final_train) == len(task.train) + len(task.validation)
    assert sum(len(t.final_train) + len(t.test) for t in (first, second)) == 1797
    train = torch.stack([image for image, _ in first.train])
    assert abs(train.mean().item()) < 1e-5
    assert abs(train.std(unbiased=False).item() - 1) < 1e-5


def test_tasks_come_from_any_list_of_classes():
    tasks = load_tasks(["digits:0-1", "digits:2,4,9", "digits"])
    assert [task.classes for task in tasks] == [2, 3, 10]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mnist"], "unknown task 'mnist'"),
        (["digits:7"], "at least two classes"),
        (["digits:1,1-3"], "each once"),
        (["digits:1-"], "expected classes such as"),
        (["digits:0-4", "digits:0-4"], "given twice"),
        ([], "at least one task"),
    ],
)
def test_unknown_tasks_are_refused(names, message):
    with pytest.raises(TaskError, match=message):
        load_tasks(names)


def test_tasks_with_images_of_other_sizes_are_refused():
    def task(name, size):
        data = [(torch.zeros(1, size, size), 0)]
        return Task(name, 2, data, data, data, data)

    with pytest.raises(TaskError, match=r"'b' has images of shape \(1, 9, 9\), task 'a' of shape \(1, 8, 8\)"):
        check_compatible([task("a", 8), task("b", 9)])


IMAGES, LABELS = torch.zeros(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 2


def _listed(images, labels):
    return list(zip(images, labels, strict=True))


class _Endless(IterableDataset):
    def __iter__(self):
        yield IMAGES[0], 0


@pytest.mark.parametrize("part", ["train", "validation", "final_train", "test"])
@pytest.mark.parametrize("kind", [TensorDataset, _listed])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:, 0], LABELS, r"expected images of shape \(C, H, W\), got \(4, 4\).*unsqueeze"),
        (IMAGES.flatten(1), LABELS, r"expected images of shape \(C, H, W\), got \(16,\)"),
        (IMAGES.float(), LABELS, r"expected images of torch.float64, as the networks, got torch.float32"),
        (IMAGES, LABELS.float(), r"expected the class of an image to be one number, torch.int64; got torch.float32"),
        (
            IMAGES,
            torch.eye(8, 2).long(),
            r"expected the class .* one number, torch.int64; got torch.int64 of shape \(2,\)",
        ),
        (IMAGES, LABELS + 1, "expected classes from 0 to 1, got 2"),
        (IMAGES, LABELS - 1, "expected classes from 0 to 1, got -1"),
        (IMAGES[:0], LABELS[:0], "expected images, got none"),
    ],
)
def test_data_that_cannot_be_used_are_refused(images, labels, message, kind, part):
    parts = dict.fromkeys(("train", "validation", "final_train", "test"), TensorDataset(IMAGES, LABELS))
    with pytest.raises(TaskError, match=f"task 'mine', {part}: {message}"):
        Task("mine", 2, **(parts | {part: kind(images, labels)}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_Endless(), "expected a data set with a length, got _Endless"),
        ([IMAGES[0]], r"expected items \(image, class\), got tensor"),
        (TensorDataset(IMAGES), r"expected items \(image, class\), got \(tensor"),
        ([("picture", 0)], r"expected items \(image, class\), got \('picture', 0\)"),
        ([(object(), 0)], r"expected items \(image, class\) that make a batch.*found <class 'object'>"),
        ([(IMAGES[0], 0), (IMAGES[0, :, 1:], 1)], "that make a batch, with images of one shape"),
    ],
)
def test_data_that_are_no_images_with_classes_are_refused(data, message):
    with pytest.raises(TaskError, match=f"(?s)task 'mine', train: .*{message}"):
        Task("mine", 2, data, data, data, data)


def test_a_wrong_class_is_found_wherever_it_stands():
    labels = torch.zeros(5000, dtype=torch.int64)
    labels[1234] = 2
    good = TensorDataset(IMAGES, LABELS)
    with pytest.raises(TaskError, match="'mine', test: expected classes from 0 to 1, got 2"):
        Task("mine", 2, good, good, good, TensorDataset(torch.zeros(5000, 1, 1, 1), labels))
    # Where items are read one by one, the ends and some between: enough for classes in order.
    in_order = [(IMAGES[0], i // 100) for i in range(300)]
    with pytest.raises(TaskError, match="'mine', test: expected classes from 0 to 1, got 2"):
        Task("mine", 2, good, good, good, in_order)


def test_a_task_needs_two_classes():
    good = TensorDataset(IMAGES, LABELS)
    with pytest.raises(TaskError, match="task 'mine': classes = 1: expected an integer of at least 2"):
        Task("mine", 1, good, good, good, good)


@pytest.mark.parametrize(("part", "sizes"), [("train", (7, 8)), ("validation", (8, 7))])
def test_a_part_smaller_than_a_batch_is_named(part, sizes):
    train, validation = (TensorDataset(IMAGES[:size], LABELS[:size]) for size in sizes)
    task = Task("mine", 2, train, validation, train, train)
    message = rf"'mine' has 7 images in {part}; expected at least one batch of batch_size = 8\. Lower batch_size"
    with pytest.raises(TaskError, match=message):
        build_engine([task], SearchSettings(batch_size=8, channels=2, nodes=2))


def test_batches_side_by_side_end_with_the_shorter_and_shuffle_by_their_seed():
    short, long = list(range(8)), list(range(100, 130))
    pairs = SideBySide([batches(short, 4, 1), batches(long, 4, 2)])
    first, second = list(pairs), list(pairs)
    assert len(first) == len(pairs) == 2
    assert sorted(torch.cat([a for a, _ in first]).tolist()) == short
    assert not torch.equal(torch.cat([b for _, b in first]), torch.cat([b for _, b in second]))
    again = list(SideBySide([batches(short, 4, 1), batches(long, 4, 2)]))
    assert all(torch.equal(x, y) for p, q in zip(first, again, strict=True) for x, y in zip(p, q, strict=True))
