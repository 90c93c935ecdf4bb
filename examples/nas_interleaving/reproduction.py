"""The command line that makes a search again, from its settings alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any

from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.options import Settings, SettingsError
from examples.nas_interleaving.search_settings import SearchSettings, refuse_unread

_COMMAND = "python -m examples.nas_interleaving"


def command_line(settings: SearchSettings, data: DataSettings, threads: int) -> str:
    """Return the command for a search with these settings: whatever preset, table or script they came from.

    Defaults and what the algorithm does not read are left out.
    """
    words = ["search", *_options(settings), *_options(data), "--threads", str(threads)]
    return f"{_COMMAND} {shlex.join(words)}"


def _options(settings: Settings) -> Iterator[str]:
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value != f.default and not _unread(settings, f):
            yield from _option(f.name.replace("_", "-"), value)


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]


def _unread(settings: Settings, field: Field) -> bool:
    if not isinstance(settings, SearchSettings):
        return False
    try:
        refuse_unread(settings.algorithm, [field.name])
    except SettingsError:
        return True
    return False
