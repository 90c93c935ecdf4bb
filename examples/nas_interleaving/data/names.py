"""Names of tasks: a data set, and which of its classes."""

from __future__ import annotations

import re

from examples.nas_interleaving.data.labelled_images import DataError


def data_set_of(name: str) -> str:
    """Return the part of a task's name that names the data set: "digits" for "digits:0-4"."""
    return name.partition(":")[0]


def classes_of(name: str, available: int) -> list[int]:
    """Return the classes that a task's name asks for, e.g. [0, 1, 2, 7] for "digits:0-2,7"; all where it names none.

    Raises:
        DataError: they cannot be read, are fewer than two, given twice, or not among those available.

    """
    _, colon, text = name.partition(":")
    chosen: list[int] = []
    for part in text.split(",") if colon else [f"0-{available - 1}"]:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, flags=re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise DataError(f"expected classes such as 0-4 or 1,3,7; got {part!r}.")
        if max(first, last) >= available:
            raise DataError(f"expected classes from 0 to {available - 1}, got {part!r}.")
        chosen += range(first, last + 1)
    if len(set(chosen)) < 2 or len(set(chosen)) < len(chosen):
        raise DataError(f"expected at least two classes, each once; got {chosen}.")
    return chosen
