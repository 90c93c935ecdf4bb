"""The data sets by their names."""

from __future__ import annotations

from collections.abc import Callable

from examples.nas_interleaving.data.cifar import cifar10, cifar100
from examples.nas_interleaving.data.digits import Digits
from examples.nas_interleaving.data.idx import fashion_mnist, mnist
from examples.nas_interleaving.data.imagenet import ImageNet
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.data.source import Source

#: Each finds and reads its data set, or raises a `DataError`.
SOURCES: dict[str, Callable[[DataSettings], Source]] = {
    "digits": Digits,
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": ImageNet,
}
