"""CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.nas_interleaving.data.labelled_images import DataError
from examples.nas_interleaving.data.missing import download, missing
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.data.source import Source, StoredSource
from examples.nas_interleaving.data.vision import torchvision

_PADDING = 4


def cifar10(options: DataSettings) -> Source:
    """Read CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 photographs, 3×32×32, of 10 classes."""
    return _read(torchvision().datasets.CIFAR10, 10, options)


def cifar100(options: DataSettings) -> Source:
    """Read CIFAR-100 (Krizhevsky 2009): 50,000 and 10,000 photographs, 3×32×32, of 100 classes."""
    return _read(torchvision().datasets.CIFAR100, 100, options)


def _read(reader: Any, classes: int, options: DataSettings) -> Source:
    folder = Path(options.data, reader.base_folder)
    checksums: dict[str, str] = dict([*reader.train_list, *reader.test_list])
    checksums[reader.meta["filename"]] = reader.meta["md5"]
    if options.download:
        download(lambda: reader(options.data, download=True), options)
    elif not all((folder / file).is_file() for file in checksums):
        remedy = f"They are in {reader.filename} from {reader.url}, to be unpacked in {options.data}. "
        raise missing([folder], f"the files {', '.join(checksums)}", remedy, options)
    try:
        train, test = (_images(reader(options.data, train=train)) for train in (True, False))
    except RuntimeError as error:  # which does not say what file it is about
        raise _corrupt(folder, checksums) from error
    return StoredSource(train, test, classes, padding=_PADDING, flip=True, options=options)


def _corrupt(folder: Path, checksums: dict[str, str]) -> DataError:
    intact = torchvision().datasets.utils.check_integrity
    files = ", ".join(str(folder / file) for file, md5 in checksums.items() if not intact(folder / file, md5))
    return DataError(f"corrupt by their MD5 sums: {files}. Get them anew.")


def _images(read: Any) -> tuple[Tensor, np.ndarray]:
    return torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous(), np.array(read.targets)
