"""The evaluation of the packaged example: networks of genotypes, their sizes, and their training from scratch."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from examples.nas_interleaving import retrain as retrain_module
from examples.nas_interleaving.auxiliary import AuxiliaryTower, DropPath
from examples.nas_interleaving.counts import count_multiply_adds, count_parameters
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.network import DerivedCell, Network
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.presets import PRESETS
from examples.nas_interleaving.published import PUBLISHED, find_genotype
from examples.nas_interleaving.retrain import retrain
from examples.nas_interleaving.schedule import learning_rate_factor
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.tasks import Task

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
TINY = RetrainSettings(retrain_channels=2, retrain_cells=2, retrain_epochs=2, retrain_batch_size=8)
ALL_AT_ONCE = replace(
    TINY,
    retrain_epochs=3,
    retrain_auxiliary=0.4,
    retrain_drop_path=0.3,
    retrain_cutout=3,
    retrain_label_smoothing=0.1,
    retrain_schedule="linear",
    retrain_warmup_epochs=2,
)


def _task(shape=(1, 8, 8), classes=3, name="mine"):
    """Make a task whose classes differ in brightness."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % classes
    data = TensorDataset(torch.randn(24, *shape, generator=draw) + labels.view(-1, 1, 1, 1), labels)
    return Task(name, classes, data, data, data, data)


# What the authors of these networks report: millions of parameters on CIFAR-10 (36 channels, 20 cells) and on ImageNet
# (48 channels, 14 cells), without the auxiliary tower.
@pytest.mark.parametrize(
    ("name", "on_cifar", "on_imagenet"),
    [
        ("DARTS_V2", 3.349, 4.719),
        ("PC_DARTS_cifar", 3.6, 5.3),
        ("PC_DARTS_image", None, 5.3),
        ("PDARTS", 3.4, 4.9),
    ],
)
def test_published_networks_have_their_published_size(name, on_cifar, on_imagenet):
    for shape, channels, cells, classes, published in (
        (CIFAR, 36, 20, 10, on_cifar),
        (IMAGENET, 48, 14, 1000, on_imagenet),
    ):
        if published is not None:
            with torch.device("meta"):
                network = Network(PUBLISHED[name], shape, channels, cells, classes, auxiliary=True)
            tolerance = 0.0005 if round(published, 1) != published else 0.05
            assert count_parameters(network) / 1e6 == pytest.approx(published, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "channels", "published", "tolerance"),
    [
        ("DARTS_V2", 50, 574, 0.002),
        ("PC_DARTS_cifar", 48, 586, 0.03),
        ("PC_DARTS_image", 48, 597, 0.03),
        ("PDARTS", 48, 557, 0.03),
    ],
)
def test_published_networks_have_their_published_multiply_adds(name, channels, published, tolerance):
    """The reports of PC-DARTS and P-DARTS count some more than convolutions; that of DARTS fits 50 channels only."""
    with torch.device("meta"):
        network = Network(PUBLISHED[name], IMAGENET, channels, 14, 1000)
    assert count_multiply_adds(network, IMAGENET) / 1e6 == pytest.approx(published, rel=tolerance)


def test_sizes_of_a_tiny_network_are_those_counted_by_hand():
    cell = ((("sep_conv_3x3", 0), ("max_pool_3x3", 1)),)
    network = Network(Genotype(cell, cell), (1, 8, 8), 2, 2, 3, stem="cifar", auxiliary=True)
    # Stem to 6 channels; a cell of 2 channels at 8×8; a reduction cell of 4 at 4×4, which reads 6 and 2 channels.
    separable = {c: c * 9 + c * c for c in (2, 4)}
    stem, fits = 6 * 9, 2 * (6 * 2) + 6 * 4 + 2 * 4
    norms = 2 * (6 + 2 + 2 + 4 + 4) + 2 * (2 * 2 + 2 * 4)
    head = 4 * 3 + 3
    assert count_parameters(network) == stem + fits + 2 * (separable[2] + separable[4]) + norms + head
    assert sum(p.numel() for p in network.auxiliary.parameters()) > 0, "the tower is there, and does not count"
    in_stem, in_fits = 64 * stem, 64 * fits
    in_cells = 64 * 2 * separable[2] + 16 * 2 * separable[4]
    assert count_multiply_adds(network, (1, 8, 8)) == in_stem + in_fits + in_cells + 4 * 3


def test_the_stem_of_imagenet_divides_the_resolution_by_eight():
    network = Network(PUBLISHED["DARTS_V2"], (3, 128, 128), 4, 2, 5)
    s0, s1 = network.stem(torch.randn(2, 3, 128, 128))
    assert (s0.shape, s1.shape) == ((2, 4, 16, 16), (2, 4, 16, 16))
    small = Network(PUBLISHED["DARTS_V2"], (3, 127, 127), 4, 2, 5).stem(torch.randn(2, 3, 127, 127))
    assert [s.shape for s in small] == [(2, 4, 127, 127), (2, 12, 127, 127)]
    with pytest.raises(SettingsError, match="stem = 'svhn': expected one of auto, cifar, imagenet"):
        Network(PUBLISHED["DARTS_V2"], CIFAR, 4, 2, 5, stem="svhn")


@pytest.mark.parametrize(("size", "stride"), [(8, 3), (7, 2)])
def test_the_tower_pools_as_that_of_darts(size, stride):
    tower, x = AuxiliaryTower(3, 5).eval(), torch.randn(2, 3, size, size)
    expected = tower.layers(nn.AvgPool2d(5, stride=stride, count_include_pad=False)(F.relu(x)))
    torch.testing.assert_close(tower(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 5), (10, 10), (6, 40), (28, 28)])
def test_the_tower_reads_maps_of_any_size(shape):
    assert AuxiliaryTower(3, 5)(torch.randn(2, 3, *shape)).shape == (2, 5)


def test_the_tower_reads_the_cell_at_two_thirds():
    network = Network(Genotype.random(2, 0), (1, 12, 12), 2, 4, 3, auxiliary=True)
    found = []
    for cell in network.macro.cells:
        cell.register_forward_hook(lambda *given: found.append(given[-1]))
    network.auxiliary.register_forward_hook(lambda *given: found.append(given[1][0]))
    images = torch.randn(4, 1, 12, 12)
    scores, beside = network.training_scores(images, DropPath(0.0, torch.Generator()))
    assert found[-1] is found[2]
    assert scores.shape == beside.shape == (4, 3)
    torch.testing.assert_close(network(images), scores, rtol=1e-12, atol=1e-12)
    assert len(Network(Genotype.random(2, 0), (1, 12, 12), 2, 4, 3).training_scores(images, DropPath(0, None))) == 1


def test_dropped_paths_are_whole_images_and_keep_the_mean():
    drop = DropPath(0.25, torch.Generator().manual_seed(0))
    x = torch.ones(4000, 2, 3)
    out = drop(x)
    assert torch.equal(out, out[:, :1, :1].expand_as(x)), "an image goes as a whole"
    assert set(out.unique().tolist()) == {0.0, 1 / 0.75}
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    assert DropPath(0.0, torch.Generator())(x) is x


def test_every_operation_but_the_identity_is_dropped():
    cell = ((("sep_conv_3x3", 0), ("skip_connect", 1)), (("max_pool_3x3", 0), ("avg_pool_3x3", 2)))
    s0, s1 = torch.randn(2, 3, 2, 6, 6)

    def nothing(x):
        return 0 * x

    expected = torch.cat([s1, torch.zeros_like(s1)], 1)
    assert torch.equal(DerivedCell(cell, 2, False)(s0, s1, nothing), expected)
    halved = DerivedCell(cell, 2, True)(s0, s1, nothing)
    assert not halved.any(), "the skip connection of a reduction cell is no identity"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_of_every_epoch(schedule):
    settings = RetrainSettings(retrain_epochs=10, retrain_schedule=schedule, retrain_warmup_epochs=4)
    found = [learning_rate_factor(epoch, settings) for epoch in range(10)]
    falls = {
        "cosine": [0.5 + 0.5 * math.cos(math.pi * e / 10) for e in range(10)],
        "linear": [1 - e / 10 for e in range(10)],
        "constant": [1.0] * 10,
    }[schedule]
    warm = [0.25, 0.5, 0.75] + [1.0] * 7
    assert found == pytest.approx([a * b for a, b in zip(warm, falls, strict=True)])


def test_retraining_is_the_loop_written_by_hand():
    """Auxiliary loss, smoothing, clipping, schedule; nothing random but the order of the batches."""
    task, genotype = _task(), Genotype.random(2, 3)
    settings = replace(ALL_AT_ONCE, retrain_drop_path=0.0, retrain_cutout=0, retrain_grad_clip=0.5)
    torch.manual_seed(5)
    network = Network(genotype, (1, 8, 8), 2, 2, 3, auxiliary=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=3e-4)
    loader = task.batches("final_train", 8, 5, option="")
    for rate in (0.025, 0.05 * 2 / 3, 0.05 / 3):
        optimizer.param_groups[0]["lr"] = rate
        losses = []
        for images, labels in loader:
            scores, beside = network.training_scores(images, DropPath(0.0, None))
            targets = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
            loss = sum(w * -(targets * s.log_softmax(1)).sum(1).mean() for w, s in ((1.0, scores), (0.4, beside)))
            optimizer.zero_grad()
            loss.backward()
            total = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
            assert total > 0.5, "or nothing would be clipped"
            for p in network.parameters():
                p.grad *= 0.5 / (total + 1e-6)
            optimizer.step()
            losses.append(loss.item())
    result = retrain(genotype, task, settings, 5)
    assert result.train_loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    network.eval()
    images, labels = task.test.tensors
    assert result.loss == pytest.approx(F.cross_entropy(network(images), labels).item(), rel=1e-9)
    assert result.accuracy == (network(images).argmax(1) == labels).double().mean().item()
    assert len(result.train_accuracies) == 3
    assert (result.parameters, result.multiply_adds) == (
        count_parameters(network),
        count_multiply_adds(network, (1, 8, 8)),
    )


def _scores(result):
    return replace(result, seconds=0.0)


def test_retraining_with_everything_random_is_the_same_twice_and_another_with_another_seed():
    task, genotype = _task(), Genotype.random(2, 3)
    first = retrain(genotype, task, ALL_AT_ONCE, 1)
    torch.rand(7)  # a different state of the global generator must not matter
    assert _scores(retrain(genotype, task, ALL_AT_ONCE, 1)) == _scores(first)
    assert retrain(genotype, task, ALL_AT_ONCE, 2).loss != first.loss


@pytest.mark.parametrize(
    "change",
    [
        {"retrain_auxiliary": 0.0},
        {"retrain_drop_path": 0.0},
        {"retrain_cutout": 0},
        {"retrain_label_smoothing": 0.0},
        {"retrain_schedule": "cosine"},
        {"retrain_warmup_epochs": 0},
        {"retrain_stem": "imagenet"},
    ],
)
def test_every_option_of_the_training_has_an_effect(change):
    task, genotype = _task(), Genotype.random(2, 3)
    other = replace(ALL_AT_ONCE, **change)
    assert retrain(genotype, task, ALL_AT_ONCE, 1).loss != retrain(genotype, task, other, 1).loss


def test_the_share_of_dropped_paths_grows_from_zero_to_its_maximum(monkeypatch):
    rates, seeds = [], set()

    def look(rate, draws):
        rates.append(rate)
        seeds.add(draws.initial_seed())
        return DropPath(rate, draws)

    monkeypatch.setattr(retrain_module, "DropPath", look)
    for seed in (0, 1):
        retrain(Genotype.random(1, 0), _task(), replace(TINY, retrain_drop_path=0.3, retrain_epochs=4), seed)
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3] * 2)
    assert len(seeds) == 2, "what is dropped follows the seed"


def test_the_test_images_are_seen_once_at_the_end(monkeypatch):
    task, seen = _task(), []
    monkeypatch.setattr(Task, "in_order", lambda self, part: seen.append(part) or _batched(getattr(self, part)))
    retrain(Genotype.random(1, 0), task, TINY, 0)
    assert seen == ["test"]


def _batched(data):
    return torch.utils.data.DataLoader(data, 8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_genotype_is_evaluated_on_any_task(name):
    for shape, classes in (((3, 9, 9), 2), ((1, 8, 8), 4)):
        result = retrain(find_genotype(name), _task(shape, classes), replace(TINY, retrain_epochs=1), 0)
        assert 0 <= result.accuracy <= 1


def test_genotypes_are_found_by_name_or_file(tmp_path):
    file = tmp_path / "genotype.json"
    file.write_text(Genotype.random(2, 0).to_json(), encoding="utf-8")
    assert find_genotype(str(file)) == Genotype.random(2, 0)
    assert find_genotype("DARTS_V2").nodes == 4
    for genotype in PUBLISHED.values():
        assert Genotype.from_json(genotype.to_json()) == genotype


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file or directory.* Expected one of DARTS_V1, DARTS_V2"), ("[]", "has the entries normal")],
)
def test_what_is_no_genotype_is_refused(content, message, tmp_path):
    file = tmp_path / "DARTS_V3"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match=f"genotype = .*DARTS_V3': .*{message}"):
        find_genotype(str(file))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"retrain_drop_path": 1.0}, "retrain_drop_path = 1.0: expected a number from 0 up to 1, without 1"),
        ({"retrain_label_smoothing": True}, "expected a number from 0 up to 1"),
        ({"retrain_schedule": "step"}, "expected one of cosine, linear, constant"),
        ({"retrain_warmup_epochs": 15}, "retrain_warmup_epochs = 15, retrain_epochs = 15: expected fewer"),
        ({"retrain_stem": "large"}, "expected one of auto, cifar, imagenet"),
    ],
)
def test_settings_of_the_training_out_of_range_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        RetrainSettings.from_dict(values)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SettingsError, match="device = 'nowhere'"):
        retrain(Genotype.random(1, 0), _task(), replace(TINY, retrain_device="nowhere"), 0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings(name):
    left = set(PRESETS[name])
    for kind in (SearchSettings, RetrainSettings, DataSettings):
        own = {f.name for f in fields(kind)} & left
        kind.from_dict({key: PRESETS[name][key] for key in own})
        left -= own
    assert not left
