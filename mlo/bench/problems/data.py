"""The data sets of the benchmark."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mlo.errors import ConfigurationError

#: Where Debian's package dataset-fashion-mnist puts its files.
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_IMAGES, _LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
_GREY = 255.0


class Data(NamedTuple):
    """Inputs and classes (or targets)."""

    x: Tensor
    y: Tensor


def synthetic_regression(rows: int, columns: int, seed: int) -> Data:
    """Return Gaussian inputs of unlike scales, and targets with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -0.5, columns, dtype=torch.float64)
    truth = torch.randn(columns, generator=generator, dtype=torch.float64)
    return Data(x, x @ truth + torch.randn(rows, generator=generator, dtype=torch.float64))


def breast_cancer() -> Data:
    """Return 569 rows of 30 standardised measurements, and classes 0 and 1."""
    return _standardised(*_scikit_learn("load_breast_cancer"))


def digits() -> Data:
    """Return 1,797 rows of 64 standardised grey levels, and classes 0 to 9."""
    return _standardised(*_scikit_learn("load_digits"))


def fashion_mnist_missing(folder: Path) -> str | None:
    """Return why Fashion-MNIST cannot be read from a folder, `None` where it can."""
    missing = [name for name in (_IMAGES, _LABELS) if _idx_file(folder, name) is None]
    if not missing:
        return None
    return (
        f"Fashion-MNIST: expected the files {' and '.join(missing)} (or with .gz) in {folder}. Install Debian's "
        "package dataset-fashion-mnist, or name another folder with --data"
    )


def fashion_mnist(folder: Path) -> Data:
    """Return the 60,000 training images as rows of 784 grey levels about 0, and classes 0 to 9.

    Raises:
        ConfigurationError: the files are not there.

    """
    missing = fashion_mnist_missing(folder)
    if missing is not None:
        raise ConfigurationError(f"{missing}.")
    images, labels = _idx(folder, _IMAGES, 16), _idx(folder, _LABELS, 8)
    return Data((images.view(len(labels), -1).float() / _GREY - 0.2860) / 0.3530, labels.long())


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _idx(folder: Path, name: str, header: int) -> Tensor:
    """Return the bytes of an IDX file after its header."""
    path = _idx_file(folder, name)
    assert path is not None, name
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8)


def parts(data: Data, fractions: Sequence[float], seed: int) -> list[Data]:
    """Return disjoint random parts of the data."""
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
    ends = [0, *(int(len(order) * f + 0.5) for f in torch.tensor(fractions, dtype=torch.float64).cumsum(0).tolist())]
    chosen = [order[a:b] for a, b in pairwise(ends)]
    return [Data(data.x[i], data.y[i]) for i in chosen]


def _scikit_learn(loader: str) -> tuple[Tensor, Tensor]:
    try:
        from sklearn import datasets  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(
            f"the data of {loader}: expected scikit-learn, which is not installed ({error}). Install it with "
            '`pip install "mlo-torch[bench]"`, or choose other problems.'
        ) from error
    features, classes = getattr(datasets, loader)(return_X_y=True)
    return torch.as_tensor(features, dtype=torch.float64), torch.as_tensor(classes)


def _standardised(x: Tensor, y: Tensor) -> Data:
    return Data((x - x.mean(0)) / x.std(0).clamp(min=1e-6), y)
