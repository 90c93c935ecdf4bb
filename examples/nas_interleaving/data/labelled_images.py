"""What a data set of labelled images must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

_SAMPLE = 32


class DataError(ValueError):
    """A data set does not hold what the networks can be trained on."""


def check_labelled_images(data: Dataset, classes: int) -> None:
    """Check that a data set holds images of one shape (C, H, W), and their classes from 0.

    A `TensorDataset` is checked as a whole. Of any other, whose items can be slow to read, some are: the first, the
    last, and others in equal distances, since data sets are often sorted by class.

    Raises:
        DataError: it does not; the message says what it holds.

    """
    images, labels = _as_batch(data)
    shape, precision = tuple(images.shape[1:]), torch.get_default_dtype()
    if len(shape) != 3:
        remedy = " A dimension for the one channel is added by unsqueeze(0)." if len(shape) == 2 else ""
        raise DataError(f"expected images of shape (C, H, W), got {shape}.{remedy}")
    if images.dtype != precision:
        raise DataError(f"expected images of {precision}, as the networks, got {images.dtype}. Convert the images.")
    if labels.dtype != torch.int64 or labels.dim() != 1:
        got = f"{labels.dtype} of shape {tuple(labels.shape[1:])}"
        raise DataError(f"expected the class of an image to be one number, torch.int64; got {got}.")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        remedy = "Number the classes from 0, or correct the number of classes."
        raise DataError(f"expected classes from 0 to {classes - 1}, got {int(outside[0])}. {remedy}")


def _as_batch(data: Dataset) -> tuple[Tensor, Tensor]:
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        raise DataError(f"expected a data set with a length, got {type(data).__name__}.") from None
    if length == 0:
        raise DataError("expected images, got none.")
    found = data.tensors if isinstance(data, TensorDataset) else _sample(data, length)
    if not isinstance(found, tuple | list) or len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
        raise DataError(f"expected items (image, class), got {data[0]!r:.100}.")
    return found[0], found[1]


def _sample(data: Dataset, length: int) -> Any:
    items = [data[i] for i in sorted({i * (length - 1) // (_SAMPLE - 1) for i in range(_SAMPLE)})]
    try:
        return default_collate(items)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"expected items (image, class) that make a batch, with images of one shape: {error}"
        ) from error
