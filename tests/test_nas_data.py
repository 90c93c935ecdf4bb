"""The data sets of the packaged example: files, splits, sizes, augmentation, and what is said when they are missing."""

import builtins
import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.nas_interleaving.cli import main
from examples.nas_interleaving.data import idx
from examples.nas_interleaving.data.augmentation import ShiftAndFlip, cutout
from examples.nas_interleaving.data.imagenet import views
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.data.stored import Scale, resized
from examples.nas_interleaving.data.vision import torchvision
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.tasks import PARTS, TaskError, load_tasks


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 8)])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_cutout_zeroes_one_square_that_may_lie_across_the_border(height, width, length):
    images = torch.rand(400, 3, height, width) + 1
    out = cutout(images, length, _generator())
    kept = out != 0
    assert torch.equal(out, torch.where(kept, images, 0))
    assert (kept == kept[:, :1]).all(), "the channels are cut at one place"
    sizes, centres = set(), torch.zeros(height, width)
    for hole in ~kept[:, 0]:
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == len(rows) * len(columns) > 0
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        sizes.add((len(rows), len(columns)))
        centres[hole] += 1
    assert max(sizes) == (length, length)
    assert min(r for r, _ in sizes) == (length + 1) // 2, "a centre at the border leaves at least a half"
    assert centres.min() > 0, "every pixel is cut at some time"


def test_cutout_is_drawn_from_its_generator_and_leaves_its_images():
    images = torch.ones(8, 1, 9, 9)
    first, again, other = (cutout(images, 4, _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, torch.ones(8, 1, 9, 9))
    assert torch.equal(cutout(images, 0, _generator()), images)
    assert (cutout(images, 18, _generator()) == 0).all()


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (1, False), (2, True)])
def test_each_image_is_shifted_and_mirrored_on_its_own(padding, flip):
    size = 5
    images = (torch.arange(3 * size * size).view(1, 3, size, size) + 1).to(torch.uint8).expand(900, -1, -1, -1)
    out = ShiftAndFlip(padding, flip)(images, _generator())
    padded = torch.nn.functional.pad(images[:1], (padding,) * 4)
    seen = torch.zeros(len(images), dtype=torch.int64)
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[:, :, row : row + size, column : column + size]
            for view in [crop, crop.flip(3)] if flip else [crop]:
                found = (out == view).flatten(1).all(1)
                assert 0.3 < found.double().mean() * (2 * padding + 1) ** 2 * (2 if flip else 1) < 2.5
                seen += found
    assert (seen == 1).all(), "every image is one of these views"
    assert torch.equal(out, ShiftAndFlip(padding, flip)(images, _generator()))


# Small data sets in the files of the real ones. The first pixels of an image are black and white, and the others tell
# which image it is.


def _pictures(counts=(80, 40), channels=1, size=6):
    """Return images and labels of a training and a test part."""
    draw, parts = np.random.default_rng(0), []
    for count in counts:
        pixels = draw.integers(0, 256, (count, channels, size, size), dtype=np.uint8)
        pixels[:, :, 0, 0], pixels[:, :, 0, 1] = 0, 255
        parts.append((pixels, np.arange(count) % 10))
    return parts


def _write_idx(folder, parts=None, *, zipped=False):
    parts = parts or _pictures()
    folder.mkdir(parents=True)
    for part, (pixels, labels) in zip(("train", "t10k"), parts, strict=True):
        for name, array in (("images-idx3", pixels[:, 0]), ("labels-idx1", labels.astype(np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = head + array.tobytes()
            path = folder / f"{part}-{name}-ubyte{'.gz' * zipped}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return parts


def _raw(data):
    """Return the 8-bit images of a part as bytes, with their classes."""
    found = []
    for image, label in data:
        black, white = image[:, :1, :1], image[:, :1, 1:2]
        found.append((((image - black) / (white - black) * 255).round().to(torch.uint8).numpy().tobytes(), int(label)))
    return found


def _given(pixels, labels, classes=range(10)):
    return [(p.tobytes(), list(classes).index(c)) for p, c in zip(pixels, labels, strict=True) if c in classes]


@pytest.fixture
def no_package(monkeypatch, tmp_path):
    """Whatever the machine has installed, Fashion-MNIST is not there."""
    package = tmp_path / "package"
    monkeypatch.setattr(idx, "_PACKAGE", package)
    return package


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", "data/mnist"),
        ("mnist", "data/MNIST/raw"),
        ("fashion-mnist", "data/fashion-mnist"),
        ("fashion-mnist", "data/FashionMNIST/raw"),
        ("fashion-mnist", "package"),
    ],
)
def test_idx_files_are_found_wherever_they_may_lie(name, place, zipped, tmp_path, no_package):
    train, test = _write_idx(tmp_path / place, zipped=zipped)
    (task,) = load_tasks([name], DataSettings(data=str(tmp_path / "data")))
    assert (task.classes, task.image_shape) == (10, (1, 6, 6))
    assert sorted(_raw(task.final_train)) == sorted(_given(*train))
    assert sorted(_raw(task.test)) == sorted(_given(*test))


@pytest.mark.skipif(not idx._PACKAGE.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_real_fashion_mnist_is_read_whole(tmp_path):
    (task,) = load_tasks(["fashion-mnist"], DataSettings(data=str(tmp_path), image_size=8))
    assert [len(getattr(task, part)) for part in PARTS] == [30_000, 30_000, 60_000, 10_000]
    for part, count in zip(PARTS, (3000, 3000, 6000, 1000), strict=True):
        labels = torch.cat([labels for _, labels in task.in_order(part, 1000)])
        assert labels.bincount().tolist() == [count] * 10


def test_halves_are_disjoint_even_in_every_class_and_the_same_in_every_task(tmp_path):
    train, test = _write_idx(tmp_path / "mnist")
    options = DataSettings(data=str(tmp_path))
    whole, some = load_tasks(["mnist", "mnist:7,1-3"], options)
    assert sorted(_raw(some.final_train)) == sorted(_given(*train, [7, 1, 2, 3]))
    assert sorted(_raw(some.test)) == sorted(_given(*test, [7, 1, 2, 3]))
    for task in (whole, some):
        halves = [_raw(task.train), _raw(task.validation)]
        assert sorted(halves[0] + halves[1]) == sorted(_raw(task.final_train))
        assert not set(halves[0]) & set(halves[1])
        for half in halves:
            assert [sum(label == c for _, label in half) for c in range(task.classes)] == [4] * task.classes
    assert {image for image, _ in _raw(some.train)} < {image for image, _ in _raw(whole.train)}
    (again,) = load_tasks(["mnist"], options)
    assert _raw(again.train) == _raw(whole.train)


def test_the_numbers_of_images_can_be_limited(tmp_path):
    _write_idx(tmp_path / "mnist")
    (limited,) = load_tasks(
        ["mnist:0-4"], DataSettings(data=str(tmp_path), images_per_class=5, test_images_per_class=3)
    )
    (whole,) = load_tasks(["mnist:0-4"], DataSettings(data=str(tmp_path)))
    sizes = {part: len(getattr(limited, part)) for part in PARTS}
    assert sizes == {"train": 10, "validation": 15, "final_train": 25, "test": 15}
    for part in ("final_train", "test"):
        assert set(_raw(getattr(limited, part))) < set(_raw(getattr(whole, part)))
        counts = [sum(label == c for _, label in _raw(getattr(limited, part))) for c in range(5)]
        assert len(set(counts)) == 1, "each class gives as many"
    (digits,) = load_tasks(["digits:3,4"], DataSettings(images_per_class=20, test_images_per_class=7))
    assert [len(getattr(digits, part)) for part in PARTS] == [20, 20, 40, 14]


@pytest.mark.parametrize("size", [3, 6, 12])
def test_images_come_in_the_size_that_is_asked_for(size, tmp_path):
    _write_idx(tmp_path / "mnist")
    for name in ("mnist", "digits"):
        (task,) = load_tasks([name], DataSettings(data=str(tmp_path), image_size=size))
        assert task.image_shape == (1, size, size)


def test_a_smaller_image_holds_averages():
    pixels = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    pixels[:, :, :, 14:] = 200
    pixels[:, :, ::2] += 40
    small = resized(pixels, DataSettings(image_size=4))[0, 0]
    assert small.dtype == torch.uint8
    assert (small[:, 0].double() - 20).abs().max() <= 2
    assert (small[:, 3].double() - 220).abs().max() <= 2
    noise = torch.randint(0, 256, (20, 3, 28, 28), dtype=torch.uint8)
    expected = torchvision().transforms.v2.functional.resize(noise, [8, 8], antialias=True)
    found = resized(noise, DataSettings(image_size=8))
    # Kernels for bytes round halves, and their weights, in one way or another.
    assert (found.int() - expected.int()).abs().max() <= 1
    exact = torch.nn.functional.interpolate(noise.double(), (8, 8), mode="bilinear", antialias=True)
    assert (found - exact).mean().abs() < 0.05, "rounded to the nearest, not down"


def test_images_are_normalised_by_the_training_half(tmp_path):
    _, test = _write_idx(tmp_path / "mnist")
    (task,) = load_tasks(["mnist:2-5"], DataSettings(data=str(tmp_path)))
    train = torch.stack([image for image, _ in task.train])
    assert abs(train.mean()) < 1e-12
    assert abs(train.std(unbiased=False) - 1) < 1e-12
    assert abs(torch.stack([image for image, _ in task.test]).mean()) > 1e-4
    raw = np.frombuffer(b"".join(image for image, _ in _raw(task.train)), np.uint8)
    chosen = test[0][(test[1] >= 2) & (test[1] <= 5)]
    expected = np.sort((chosen.astype(float) - raw.mean()) / raw.std(), axis=None)
    found = np.sort(torch.stack([image for image, _ in task.test]).numpy(), axis=None)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_each_channel_has_its_own_scale_and_one_colour_none():
    pixels = torch.randint(0, 200, (50, 3, 4, 4), dtype=torch.uint8)
    pixels[:, 1] = 7
    found = Scale.of(pixels).normalise(pixels)
    assert (found[:, 1] == 0).all()
    for c in (0, 2):
        values = pixels[:, c].double()
        expected = (values - values.mean()) / values.std(unbiased=False)
        torch.testing.assert_close(found[:, c], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "size", "shift", "flip"),
    [("mnist", 28, 2, False), ("fashion-mnist", 28, 2, True), ("fashion-mnist", 8, 1, True), ("digits", 8, 0, False)],
)
def test_what_is_learned_from_is_changed_and_what_is_tested_is_not(name, size, shift, flip, tmp_path):
    pixels = np.zeros((40, 1, 28, 28), np.uint8)
    pixels[:, :, :, :7], pixels[:, :, :7] = 250, 250  # a corner that tells of shifts and of mirror images
    _write_idx(tmp_path / name, [(pixels, np.arange(40) % 10)] * 2)
    (task,) = load_tasks([name], DataSettings(data=str(tmp_path), image_size=size))
    for part in PARTS:
        plain = {image.numpy().tobytes() for batch, _ in task.in_order(part) for image in batch}
        assert plain == {image.numpy().tobytes() for image, _ in getattr(task, part)}
        loader = task.batches(part, 10, 0, option="batch_size")
        seen = {image.numpy().tobytes() for _ in range(60) for batch, _ in loader for image in batch}
        if part == "test" or name == "digits":
            assert seen <= plain
        else:
            assert len(seen) == (2 * shift + 1) ** 2 * (2 if flip else 1)
    (still,) = load_tasks([name], DataSettings(data=str(tmp_path), image_size=size, augment=False))
    plain = {image.numpy().tobytes() for image, _ in still.train}
    assert {
        image.numpy().tobytes() for batch, _ in still.batches("train", 10, 0, option="") for image in batch
    } <= plain


def test_the_changes_depend_on_the_seed_alone_and_are_new_in_each_pass(tmp_path):
    _write_idx(tmp_path / "fashion-mnist")
    (task,) = load_tasks(["fashion-mnist"], DataSettings(data=str(tmp_path)))

    def two_passes(seed):
        loader = task.batches("train", 40, seed, option="batch_size")
        return [(images, labels) for _ in range(2) for images, labels in loader]

    first, again, other = two_passes(1), two_passes(1), two_passes(2)
    torch.manual_seed(5)
    for found in (again, two_passes(1)):
        assert all(torch.equal(a, b) for p, q in zip(first, found, strict=True) for a, b in zip(p, q, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    passes = [sorted(image.numpy().tobytes() for image in images) for images, _ in first]
    assert passes[0] != passes[1], "not only the order is another"


def _refused(name, message, **options):
    with pytest.raises(TaskError, match=message) as caught:
        load_tasks([name], DataSettings(**options))
    return str(caught.value)


def test_missing_data_are_described_with_every_place_and_remedy(tmp_path, no_package):
    data = str(tmp_path / "data")
    text = _refused("fashion-mnist:0-4", "task 'fashion-mnist:0-4': no data found", data=data)
    for place in (f"{data}/FashionMNIST/raw", f"{data}/fashion-mnist", str(no_package)):
        assert place in text
    for remedy in ("dataset-fashion-mnist", "option download", "option data", "MLO_DATA", "train-images-idx3-ubyte"):
        assert remedy in text
    assert "Debian" not in _refused("mnist", "data/mnist", data=data)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda c: c[:-30], "cannot be read: .*Get the file anew"),
        ("train-images-idx3-ubyte.gz", lambda c: c[:40] + b"????" + c[44:], "cannot be read: .*Get the file anew"),
        ("train-images-idx3-ubyte.gz", lambda c: b"no", "cannot be read: .*Get the file anew"),
        (
            "t10k-images-idx3-ubyte",
            lambda c: c[:-1],
            r"expected 1,440 bytes after the head, for \(40, 6, 6\); got 1,439",
        ),
        ("t10k-images-idx3-ubyte", lambda c: c + b"x", "expected .* got 1,441"),
        ("t10k-images-idx3-ubyte", lambda c: c[:7], "expected an IDX file of unsigned bytes; it begins with"),
        ("t10k-labels-idx1-ubyte", lambda c: b"", "expected an IDX file of unsigned bytes; it begins with b''"),
        ("t10k-labels-idx1-ubyte", lambda c: b"<!DOCTYPE html>", "expected .* it begins with b'<!DO'"),
    ],
)
def test_a_corrupt_idx_file_is_named(file, change, message, tmp_path):
    _write_idx(tmp_path / "mnist", zipped=file.endswith(".gz"))
    path = tmp_path / "mnist" / file
    path.write_bytes(change(path.read_bytes()))
    _refused("mnist", f"task 'mnist': {path}:? {message}", data=str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [lambda p, c: (p, c[:-1]), lambda p, c: (p, c + 1), lambda p, c: (p[:, :, 0], c), lambda p, c: (p, c[:, None])],
)
def test_images_without_fitting_labels_are_refused(change, tmp_path):
    train, test = _pictures()
    _write_idx(tmp_path / "mnist", [change(*train), test])
    _refused("mnist", r"expected as many images as labels from 0 to 9 in the files train-\*", data=str(tmp_path))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Stands in for the place that torchvision downloads MNIST from."""
    folder = tmp_path / "mirror"
    parts = _write_idx(folder, zipped=True)
    reader = torchvision().datasets.MNIST
    sums = [(file, hashlib.md5((folder / file).read_bytes()).hexdigest()) for file, _ in reader.resources]
    monkeypatch.setattr(reader, "resources", sums)
    handler = partial(_Quiet, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(reader, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        yield folder, parts
        server.shutdown()
        thread.join()


def test_what_is_missing_is_downloaded_if_asked_for(mirror, tmp_path):
    data = str(tmp_path / "data")
    _refused("mnist", "no data found", data=data)
    (task,) = load_tasks(["mnist"], DataSettings(data=data, download=True))
    assert sorted(_raw(task.test)) == sorted(_given(*mirror[1][1]))
    (mirror[0] / "t10k-labels-idx1-ubyte.gz").unlink()
    (again,) = load_tasks(["mnist"], DataSettings(data=data, download=True))
    assert len(again.test) == 40, "what is there is not downloaded again"


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision().datasets.MNIST, "mirrors", [(tmp_path / "nothing").as_uri() + "/"])
    data = str(tmp_path / "data")
    message = f"task 'mnist': the download into {data} failed: .*train-images-idx3-ubyte.gz.*by other means"
    _refused("mnist", message, data=data, download=True)


def _write_cifar(folder, reader, parts, monkeypatch):
    """Write the pickles of CIFAR's archive, and make torchvision expect their sums in place of the real ones."""
    base = folder / reader.base_folder
    base.mkdir(parents=True)
    (train, train_labels), test = parts
    files = [file for file, _ in reader.train_list]
    batches = [
        *zip(files, np.array_split(train, len(files)), np.array_split(train_labels, len(files)), strict=True),
        (reader.test_list[0][0], *test),
    ]
    sums = {}
    for file, pixels, labels in batches:
        label = "fine_labels" if reader.base_folder == "cifar-100-python" else "labels"
        content = pickle.dumps({"data": pixels.reshape(len(pixels), -1), label: labels.tolist()}, protocol=2)
        sums[file] = content
    sums[reader.meta["filename"]] = pickle.dumps({reader.meta["key"]: [str(c) for c in range(100)]}, protocol=2)
    for file, content in sums.items():
        (base / file).write_bytes(content)
        sums[file] = hashlib.md5(content).hexdigest()
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(reader, attribute, [[file, sums[file]] for file, _ in getattr(reader, attribute)])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": sums[reader.meta["filename"]]})
    return base


def _cifar(name):
    return getattr(torchvision().datasets, name.upper())


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_its_own_files(name, classes, tmp_path, monkeypatch):
    (train, _), (test, _) = _pictures((400, 200), 3, 32)
    parts = [(train, np.arange(400) % classes), (test, np.arange(200) % classes)]
    _write_cifar(tmp_path, _cifar(name), parts, monkeypatch)
    whole, some = load_tasks([name, f"{name}:0,3,7-9"], DataSettings(data=str(tmp_path)))
    assert (whole.classes, some.classes, whole.image_shape) == (classes, 5, (3, 32, 32))
    assert sorted(_raw(whole.final_train)) == sorted(_given(*parts[0], range(classes)))
    assert sorted(_raw(some.test)) == sorted(_given(*parts[1], [0, 3, 7, 8, 9]))


def test_cifar_is_shifted_by_four_pixels_and_mirrored(tmp_path, monkeypatch):
    pixels = np.zeros((40, 3, 32, 32), np.uint8)
    pixels[:, :, :, :7], pixels[:, :, :7] = 250, 250
    _write_cifar(tmp_path, _cifar("cifar10"), [(pixels, np.arange(40) % 10)] * 2, monkeypatch)
    (task,) = load_tasks(["cifar10"], DataSettings(data=str(tmp_path)))
    loader = task.batches("train", 20, 0, option="batch_size")
    seen = {image.numpy().tobytes() for _ in range(120) for batch, _ in loader for image in batch}
    assert len(seen) == 9 * 9 * 2


def test_a_corrupt_cifar_file_is_named_and_a_missing_one_described(tmp_path, monkeypatch):
    base = _write_cifar(tmp_path, _cifar("cifar10"), _pictures((40, 20), 3, 32), monkeypatch)
    good = (base / "data_batch_3").read_bytes()
    (base / "data_batch_3").write_bytes(good[:-1])
    _refused("cifar10", rf"task 'cifar10': corrupt by their MD5 sums: {base}/data_batch_3\.", data=str(tmp_path))
    (base / "data_batch_3").write_bytes(good)
    (base / "batches.meta").write_bytes(b"")
    _refused("cifar10", f"corrupt by their MD5 sums: {base}/batches.meta", data=str(tmp_path))
    (base / "data_batch_3").unlink()
    text = _refused("cifar10", "task 'cifar10': no data found", data=str(tmp_path))
    for part in (str(base), "data_batch_3", "cifar-10-python.tar.gz", "option download", "MLO_DATA"):
        assert part in text


def test_the_archive_of_cifar_is_unpacked_without_a_download(tmp_path, monkeypatch):
    reader, data = _cifar("cifar100"), tmp_path / "data"
    parts = _pictures((40, 20), 3, 32)
    base = _write_cifar(tmp_path / "made", reader, parts, monkeypatch)
    data.mkdir()
    with tarfile.open(data / reader.filename, "w:gz") as archive:
        archive.add(base, reader.base_folder)
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5((data / reader.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(reader, "url", (tmp_path / "nothing").as_uri())
    (task,) = load_tasks(["cifar100:0-9"], DataSettings(data=str(data), download=True))
    assert sorted(_raw(task.test)) == sorted(_given(*parts[1]))
    (data / reader.filename).unlink()
    (data / reader.base_folder / "train").unlink()
    _refused("cifar100", f"the download into {data} failed", data=str(data), download=True)


def _write_photographs(folder, classes=("n01", "n02", "n03"), counts=(6, 4)):
    """Write JPEGs of one colour each: the class gives the red, the number in the class the green."""
    for part, count in zip(("train", "val"), counts, strict=True):
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (50 + i, 40), (80 * number, 40 * i, 200 if part == "val" else 0))
                image.save(folder / part / name / f"{i}.JPEG", quality=95)


def _colours(data):
    """Return class, red, green and blue of each image of one colour."""
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    levels = [(int(label), (image * deviation + mean) * 255) for image, label in data]
    assert all((image - image.mean((1, 2), keepdim=True)).abs().max() < 1e-6 for _, image in levels)
    steps = torch.tensor([80, 40, 200])
    return sorted((label, *(image.mean((1, 2)) / steps).round().int().tolist()) for label, image in levels)


def test_photographs_are_read_from_folders(tmp_path):
    _write_photographs(tmp_path / "imagenet")
    whole, some = load_tasks(["imagenet", "imagenet:2,0"], DataSettings(data=str(tmp_path), image_size=16))
    assert (whole.classes, some.classes, whole.image_shape) == (3, 2, (3, 16, 16))
    assert _colours(whole.final_train) == [(c, c, i, 0) for c in range(3) for i in range(6)]
    assert _colours(whole.test) == [(c, c, i, 1) for c in range(3) for i in range(4)]
    assert _colours(some.test) == [(c, (2, 0)[c], i, 1) for c in range(2) for i in range(4)]
    assert sorted(_colours(some.train) + _colours(some.validation)) == _colours(some.final_train)
    assert [label for label, *_ in _colours(some.train)] == [0, 0, 0, 1, 1, 1]
    halves = [{tuple(colour) for _, *colour in _colours(task.train)} for task in (whole, some)]
    assert halves[1] < halves[0], "the halves of a class are the same in every task"
    (limited,) = load_tasks(
        ["imagenet"], DataSettings(data=str(tmp_path), image_size=16, images_per_class=4, test_images_per_class=1)
    )
    assert [len(getattr(limited, part)) for part in PARTS] == [6, 6, 12, 3]


def test_photographs_are_looked_at_as_in_darts():
    plain, changed = views(224)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    assert [str(step).partition("(")[0] for step in changed.transforms[:3]] == [
        "RandomResizedCrop",
        "RandomHorizontalFlip",
        "ColorJitter",
    ]
    assert plain.transforms[0].size == [256]
    scaled = image.resize((341, 256), Image.Resampling.BILINEAR)
    centre = torch.from_numpy(np.array(scaled)[16:240, 58:282]).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(plain(image), ((centre - mean) / deviation).double(), rtol=0, atol=1e-6)
    assert changed(image).shape == (3, 224, 224)


@pytest.mark.parametrize("workers", [0, 2])
def test_changes_of_photographs_depend_on_the_seed_alone(workers, tmp_path):
    _write_photographs(tmp_path / "imagenet")
    options = DataSettings(data=str(tmp_path), image_size=8, workers=workers)
    (task,) = load_tasks(["imagenet"], options)

    def two_passes(part, seed):
        loader = task.batches(part, 3, seed, option="batch_size")
        assert loader.num_workers == workers
        return [images for _ in range(2) for images, _ in loader]

    assert task.in_order("test").num_workers == workers
    before = torch.get_rng_state()
    first, again, other = two_passes("train", 1), two_passes("train", 1), two_passes("train", 2)
    assert torch.equal(torch.get_rng_state(), before), "the draws of others are left alone"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    seen = {image.numpy().tobytes() for images in first for image in images}
    assert len(seen) == 2 * 9, "each image is changed in its own way, and anew in the second pass"
    plain = {image.numpy().tobytes() for image, _ in task.test}
    assert {image.numpy().tobytes() for images in two_passes("test", 1) for image in images} == plain
    (still,) = load_tasks(["imagenet"], replace(options, augment=False))
    learned = {image.numpy().tobytes() for images, _ in still.batches("train", 9, 0, option="") for image in images}
    assert learned == {image.numpy().tobytes() for image, _ in task.train}


def test_photographs_that_are_missing_or_corrupt_are_named(tmp_path):
    data, folder = str(tmp_path), tmp_path / "imagenet"
    text = _refused("imagenet:0-1", "task 'imagenet:0-1': no data found", data=data)
    assert str(folder) in text
    assert "image-net.org" in text
    assert "option download" not in text
    _write_photographs(folder, ["a", "b"])
    (folder / "val" / "b" / "3.JPEG").write_bytes(b"no picture")
    _refused("imagenet", f"task 'imagenet', test: {folder}/val/b/3.JPEG cannot be read", data=data, image_size=8)
    good = (folder / "train" / "b" / "3.JPEG").read_bytes()
    (folder / "train" / "b" / "3.JPEG").write_bytes(good[: len(good) // 2])
    _refused("imagenet", f"{folder}/train/b/3.JPEG cannot be read: (?i:.*truncated)", data=data, image_size=8)
    for file in (folder / "train" / "a").iterdir():
        file.unlink()
    _refused("imagenet", f"task 'imagenet': {folder}/train: .*classes a", data=data)
    (folder / "train" / "c").mkdir()
    _refused("imagenet", "expected the same classes in train and val; in only one: c", data=data)


def test_an_image_that_turns_out_corrupt_in_a_search_ends_it_with_its_name(tmp_path, capsys):
    _write_photographs(tmp_path / "imagenet", ["a", "b"], (80, 1))
    options = DataSettings(data=str(tmp_path), image_size=8)
    (task,) = load_tasks(["imagenet"], options)
    files, index = task.train._files.samples, task.train._index
    looked_at = {i * (len(index) - 1) // 31 for i in range(32)}
    file = files[index[next(i for i in range(len(index)) if i not in looked_at)]][0]
    Path(file).write_bytes(b"no picture")
    torch.set_default_dtype(torch.float32)
    flags = ["--tasks", "imagenet", "--data", str(tmp_path), "--image-size", "8", "--folder", str(tmp_path / "run")]
    small = ["--channels", "2", "--nodes", "1", "--batch-size", "40", "--steps", "3", "--warmup", "2", "--rounds", "1"]
    assert main(["search", *flags, *small]) == 2
    assert f"{file} cannot be read" in capsys.readouterr().err
    assert (tmp_path / "run" / "status.json").exists(), "the search had begun"


def test_torchvision_is_there_and_other_faults_of_it_are_not_hidden(monkeypatch):
    code = "from examples.nas_interleaving.data.vision import torchvision; print(torchvision().transforms.v2.Resize(3))"
    assert "Resize" in subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    real = builtins.__import__

    def broken(name, *given):
        if name == "torchvision":
            raise RuntimeError("something else")
        return real(name, *given)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(RuntimeError, match="something else"):
        torchvision()


def test_the_environment_names_the_folder_of_the_data():
    code = "from examples.nas_interleaving.data.settings import DataSettings; print(DataSettings().data)"
    for variable, expected in (({"MLO_DATA": "/some/place"}, "/some/place"), ({"MLO_DATA": ""}, "data"), ({}, "data")):
        environment = {k: v for k, v in os.environ.items() if k != "MLO_DATA"} | variable
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, text=True, env=environment
        )
        assert found.stdout.strip() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images_per_class": 1}, "images_per_class = 1: expected 0, or an integer of at least 2"),
        ({"test_images_per_class": -1}, "test_images_per_class = -1: expected 0, or an integer of at least 1"),
        ({"images_per_class": True}, "images_per_class = True: expected 0, or"),
        ({"data": ""}, "data = ''"),
        ({"image_size": -1}, "image_size = -1: expected an integer of at least 0"),
    ],
)
def test_data_settings_out_of_range_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        DataSettings(**values)
