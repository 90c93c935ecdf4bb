"""MNIST and data sets in its format: four IDX files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from examples.nas_interleaving.data.labelled_images import DataError
from examples.nas_interleaving.data.missing import download, missing
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.data.source import Source, StoredSource
from examples.nas_interleaving.data.vision import torchvision

_CLASSES = 10
_PADDING = 2
#: Where Debian's package dataset-fashion-mnist puts its files.
_PACKAGE = Path("/usr/share/datasets/fashion-mnist")
_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
#: The IDX format: two zero bytes, the type of the numbers (8: unsigned bytes), the number of dimensions, and the
#: size of each as a big-endian integer; then the numbers.
_UNSIGNED_BYTES = b"\x00\x00\x08"


def fashion_mnist(options: DataSettings) -> Source:
    """Read Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 60,000 and 10,000 images of clothing, 1×28×28."""
    return _read(
        "fashion-mnist",
        "FashionMNIST",
        options,
        elsewhere=[_PACKAGE],
        remedy=f"On Debian and Ubuntu the package dataset-fashion-mnist puts them into {_PACKAGE}. ",
        flip=True,
    )


def mnist(options: DataSettings) -> Source:
    """Read MNIST (LeCun et al. 1998): 60,000 and 10,000 handwritten digits, 1×28×28."""
    return _read("mnist", "MNIST", options, elsewhere=[], remedy="", flip=False)


def _read(
    name: str, in_torchvision: str, options: DataSettings, *, elsewhere: list[Path], remedy: str, flip: bool
) -> Source:
    # torchvision's own reader takes plain files in its own folders only; it does the download.
    downloaded = Path(options.data, in_torchvision, "raw")
    places = [downloaded, Path(options.data, name), *elsewhere]
    if not any(map(_complete, places)):
        if not options.download:
            raise missing(places, f"the files {', '.join(_FILES)}, plain or with .gz", remedy, options)
        download(lambda: getattr(torchvision().datasets, in_torchvision)(options.data, download=True), options)
    folder = next(filter(_complete, places), downloaded)
    images, labels, test_images, test_labels = (read_idx(_found(folder, file)) for file in _FILES)
    for part, (a, b) in {"train": (images, labels), "t10k": (test_images, test_labels)}.items():
        if a.ndim != 3 or b.ndim != 1 or len(a) != len(b) or b.max(initial=0) >= _CLASSES:
            raise DataError(
                f"{folder}: expected as many images as labels from 0 to {_CLASSES - 1} in the files {part}-*, got "
                f"images of shape {a.shape} and labels of shape {b.shape}. Get the files anew."
            )
    return StoredSource(
        (torch.from_numpy(images).unsqueeze(1), labels),
        (torch.from_numpy(test_images).unsqueeze(1), test_labels),
        _CLASSES,
        padding=_PADDING,
        flip=flip,
        options=options,
    )


def _found(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"


def _complete(folder: Path) -> bool:
    return all(_found(folder, name).is_file() for name in _FILES)


def read_idx(path: Path) -> np.ndarray:
    """Return the array of an IDX file of unsigned bytes; the name of a gzipped one ends with .gz.

    Raises:
        DataError: it is not such a file; the message names it.

    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Get the file anew.") from error
    dimensions = content[3] if content.startswith(_UNSIGNED_BYTES) and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if dimensions == 0 or len(content) < start:
        raise DataError(f"{path}: expected an IDX file of unsigned bytes; it begins with {content[:4]!r}.")
    shape = tuple(np.frombuffer(content, ">u4", dimensions, 4).tolist())
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path}: expected {math.prod(shape):,} bytes after the head, for {shape}; got "
            f"{len(content) - start:,}. Get the file anew."
        )
    return np.frombuffer(bytearray(content), np.uint8, offset=start).reshape(shape)
