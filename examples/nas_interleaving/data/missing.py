"""What is said when data are not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path

from examples.nas_interleaving.data.labelled_images import DataError
from examples.nas_interleaving.data.settings import DataSettings

_BY_DOWNLOAD = "The option download fetches them."


def missing(
    places: Sequence[Path], expected: str, remedy: str, options: DataSettings, by_download: str = _BY_DOWNLOAD
) -> DataError:
    """Return the error that says where was looked, for what, and how to get it."""
    looked = ", ".join(str(place) for place in places)
    return DataError(
        f"no data found. Expected {expected}, in one of: {looked}. {remedy}{by_download} The option data, or the "
        f"environment variable MLO_DATA, names another folder than {options.data}."
    )


def download(fetch: Callable[[], object], options: DataSettings) -> None:
    """Download data.

    Raises:
        DataError: the download fails.

    """
    try:
        fetch()
    except (OSError, RuntimeError, HTTPException) as error:
        text = " ".join(str(error).split())
        raise DataError(
            f"the download into {options.data} failed: {text}. Put the files there by other means, or try again."
        ) from error
