"""Options of the command line, made from settings."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import Field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from examples.nas_interleaving.options import Kind, Settings

_ITEMS: dict[str, type] = {"tuple[int, ...]": int, "tuple[float, ...]": float, "tuple[str, ...]": str}


def positive(text: str) -> int:
    """Read a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def add_new_folder(
    parser: argparse.ArgumentParser, text: str = "new folder for everything that the run leaves"
) -> None:
    """Add --folder."""
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs") / f"nas_{datetime.now():%Y%m%d_%H%M%S}",
        help=f"{text} (default: %(default)s, after the time)",
    )


def add_settings(parser: argparse.ArgumentParser, kind: type[Settings], without: Collection[str] = ()) -> None:
    """Add an option for each setting, but for some."""
    group = parser.add_argument_group((kind.__doc__ or "").partition("\n")[0].rstrip("."))
    for f in fields(kind):
        if f.name not in without:
            _add_setting(group, f)


def _add_setting(group: argparse._ArgumentGroup, f: Field) -> None:
    flag, name = "--" + f.name.replace("_", "-"), f.name.upper()
    shown = f.metadata["shown"] or (" ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default)
    text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
    if isinstance(f.default, bool):
        shown = f"--{'' if f.default else 'no-'}{flag[2:]}"
        text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif isinstance(f.default, tuple):
        group.add_argument(
            flag, type=_ITEMS[str(f.type)], nargs="+", action="extend", metavar=name.removesuffix("S"), help=text
        )
    else:
        group.add_argument(flag, type=type(f.default), metavar=name, help=text)


def given_settings(
    kind: type[Settings], options: argparse.Namespace, preset: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the settings that are given, by the preset or, above it, by options."""
    names = [f.name for f in fields(kind)]
    given = {name: value for name, value in (preset or {}).items() if name in names}
    for name in names:
        value = getattr(options, name, None)
        if value is not None:
            given[name] = tuple(value) if isinstance(value, list) else value
    return given


def read_settings(kind: type[Kind], options: argparse.Namespace, preset: Mapping[str, Any] | None = None) -> Kind:
    """Return the settings: those that are given, and the defaults of all others."""
    return kind.from_dict(given_settings(kind, options, preset))
