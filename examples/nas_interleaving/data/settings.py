"""Where the data sets lie, and how much of them is used."""

from __future__ import annotations

import os
from dataclasses import dataclass

from examples.nas_interleaving.options import Settings, count, flag, setting, text


def _limit(help_: str, least: int) -> int:
    expected = f"0, or an integer of at least {least}"
    return setting(0, help_, lambda v: type(v) is int and (v == 0 or v >= least), expected)


@dataclass(frozen=True)
class DataSettings(Settings):
    """Settings of the data."""

    data: str = text(
        os.environ.get("MLO_DATA") or "data",
        "folder of the data sets; the environment variable MLO_DATA sets another default",
    )
    download: bool = flag(False, "download what is not found")
    image_size: int = count(0, "height and width that images are scaled to; 0: 224 for imagenet, else as they are", 0)
    images_per_class: int = _limit("most images of a class for training and validation together; 0: all", 2)
    test_images_per_class: int = _limit("most test images of a class; 0: all", 1)
    augment: bool = flag(True, "shift, crop and mirror the training images at random, as is usual for the data set")
    workers: int = count(0, "processes that read the images of imagenet; 0: the main process does", 0)
