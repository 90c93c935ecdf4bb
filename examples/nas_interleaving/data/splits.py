"""Which images of a data set train, judge and test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from examples.nas_interleaving.data.settings import DataSettings

_SEED = 0
_TEST_SHARE = 0.3

#: Part of a task → indices of its images.
Split = dict[str, np.ndarray]


def with_own_test(labels: np.ndarray, test_labels: np.ndarray, classes: Sequence[int], options: DataSettings) -> Split:
    """Halve the training images of each class into `train` and `validation`; `test` is the data set's own.

    The halves of a class are the same in every run and in every task. `test` are indices of test images.
    """
    draws = {c: np.random.default_rng((_SEED, c)) for c in classes}
    test = [draws[c].permutation(np.flatnonzero(test_labels == c)) for c in classes]
    return _gathered([draws[c].permutation(np.flatnonzero(labels == c)) for c in classes], test, options)


def without_test(labels: np.ndarray, classes: Sequence[int], options: DataSettings) -> Split:
    """Set 30 % of the images of each class apart for the test, and halve the rest.

    The split is the same in every run. It depends on the classes before each in the list.
    """
    draw = np.random.default_rng(_SEED)
    found = [draw.permutation(np.flatnonzero(labels == c)) for c in classes]
    tests = [round(_TEST_SHARE * len(images)) for images in found]
    rest = [images[test:] for images, test in zip(found, tests, strict=True)]
    return _gathered(rest, [images[:test] for images, test in zip(found, tests, strict=True)], options)


def _gathered(training: Sequence[np.ndarray], test: Sequence[np.ndarray], options: DataSettings) -> Split:
    kept = [images[: options.images_per_class or None] for images in training]
    train = _joined(kept, lambda images: images[: len(images) // 2])
    validation = _joined(kept, lambda images: images[len(images) // 2 :])
    return {
        "train": train,
        "validation": validation,
        "final_train": np.concatenate([train, validation]),
        "test": _joined(test, lambda images: images[: options.test_images_per_class or None]),
    }


def _joined(classes: Sequence[np.ndarray], choose: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([choose(images) for images in classes])
