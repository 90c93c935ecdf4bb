"""`RunFolder`: everything that a run leaves on disk."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch

import mlo
from examples.nas_interleaving.genotype import CELL_KINDS, Genotype
from examples.nas_interleaving.options import Settings
from examples.nas_interleaving.search_settings import SearchSettings

CONFIG = "config.json"
METRICS = "metrics.jsonl"
WEIGHTS = "architecture.jsonl"
GENOTYPE = "genotype.json"
STATUS = "status.json"
RESULTS = "results.jsonl"
TABLE = "table.md"

_A_SEARCH = " Expected the folder of a search."

T = TypeVar("T")


class RunFolderError(ValueError):
    """A folder cannot be made, written or read, or is not one of a run."""


class RunFolder:
    """A folder with one file for each kind of result.

    Lines are flushed as they are written and whole files are replaced in one operation, so that an interruption
    at any moment leaves every file readable.

    Raises:
        RunFolderError: by every method, where the file system refuses or a file does not hold what it should.

    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Make a new folder.

        Raises:
            RunFolderError: there is something at this place, or nothing can be.

        """
        folder = cls(path)
        with _refused(folder.path, "made", " Expected a place for a new folder."):
            if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
                raise RunFolderError(f"{path} exists and is not empty; expected a new folder, so that no run is lost.")
            folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    def new_part(self, name: str) -> RunFolder:
        """Make a folder inside this one, with a number behind its name if the name is taken."""
        with _refused(self.path, "read"):
            taken = {found.name for found in self.path.iterdir()}
        names = (name if number == 1 else f"{name}_{number}" for number in count(1))
        return RunFolder.create(self.path / next(free for free in names if free not in taken))

    def has(self, name: str) -> bool:
        """Return whether there is such a file."""
        with _refused(self.path / name, "read"):
            return (self.path / name).exists()

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file as a whole."""
        unfinished = self.path / f".{name}.unfinished"
        with _refused(self.path / name, "written"):
            try:
                unfinished.write_bytes(content)
                os.replace(unfinished, self.path / name)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise

    def write_text(self, name: str, text: str) -> None:
        """Write a file as a whole."""
        self.write_bytes(name, f"{text}\n".encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON."""
        self.write_text(name, json.dumps(value, indent=2))

    def write_config(self, settings: Settings, data: Settings | None = None) -> None:
        """Write the settings, those of the data if they were loaded by name, and what else a run depends on."""
        self.write_json(
            CONFIG,
            {
                "settings": asdict(settings),
                **({} if data is None else {"data": asdict(data)}),
                "command": sys.argv[1:],
                "versions": {"python": platform.python_version(), "torch": torch.__version__, "mlo": mlo.__version__},
                "threads": torch.get_num_threads(),
            },
        )

    def append(self, name: str, *lines: Mapping[str, Any]) -> None:
        """Add JSON lines to a file."""
        with _refused(self.path / name, "written"), (self.path / name).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def write_lines(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write JSON lines as a whole file."""
        self.write_bytes(name, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def read_lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Return the JSON lines of a file, but for a last one that was torn when its writer was killed."""
        with _refused(self.path / name, "read", _A_SEARCH), (self.path / name).open("rb") as file:
            for number, line in enumerate(file, 1):
                content = _read_line(line, f"{self.path / name} cannot be read: line {number}")
                if content is not None:
                    yield content

    def read_bytes(self, name: str) -> bytes:
        """Return what a file holds."""
        with _refused(self.path / name, "read", _A_SEARCH):
            return (self.path / name).read_bytes()

    def read_text(self, name: str) -> str:
        """Return the text of a file."""
        return self._read(name, str)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON object."""
        return self._read(name, _json_object)

    def read_search_settings(self) -> SearchSettings:
        """Return the settings of the search in this folder."""
        return self._read(CONFIG, _search_settings)

    def read_data_settings(self) -> dict[str, Any]:
        """Return the settings of the data of the search in this folder, as far as they are known."""
        return self._read(CONFIG, lambda text: dict(_json_object(text).get("data", {})))

    def read_status(self) -> dict[str, Any]:
        """Return how far the search has come: its state, steps and seconds."""
        return self._read(STATUS, lambda text: _json_object(text, "state", "steps", "seconds"))

    def read_genotype(self) -> Genotype:
        """Return the architecture that was found: that of the last step where the search was killed."""
        return self._read(GENOTYPE, Genotype.from_json) if self.has(GENOTYPE) else self.decode_weights()

    def decode_weights(self, step: int | None = None) -> Genotype:
        """Return the architecture that the weights of a step, by default the last, stand for."""
        lines = self.read_lines(WEIGHTS)
        last = deque((line for line in lines if step is None or line.get("step") == step), maxlen=1)
        if not last:
            raise RunFolderError(f"{self.path / WEIGHTS} holds no weights: the search ended before it began.")
        most = self.read_search_settings().max_skips
        try:
            weights = {kind: torch.tensor(last[0][kind]) for kind in CELL_KINDS}
            return Genotype.decode(weights, max_skips=None if most < 0 else most)
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{self.path / WEIGHTS} cannot be read: no weights in its last line.") from error

    def _read(self, name: str, parse: Callable[[str], T]) -> T:
        file = self.path / name
        with _refused(file, "read", _A_SEARCH):
            try:
                return parse(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise RunFolderError(f"{file} cannot be read: {error}") from error


@contextmanager
def _refused(path: Path, action: str, remedy: str = "") -> Iterator[None]:
    """Turn what the file system refuses into a `RunFolderError`."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{path} cannot be {action}: {error.strerror or error}.{remedy}") from error


def _read_line(line: bytes, refusal: str) -> dict[str, Any] | None:
    """Return what a line holds, None for one that is torn."""
    try:
        return _json_object(line)
    except ValueError as error:
        if line.endswith(b"\n"):
            raise RunFolderError(f"{refusal}: {error}") from error
        return None


def _json_object(text: str | bytes, *entries: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict) or not set(entries) <= set(found):
        wanted = f" with {', '.join(entries)}" if entries else ""
        raise ValueError(f"expected a JSON object{wanted}, got {found!r:.100}.")
    return found


def _search_settings(text: str) -> SearchSettings:
    return SearchSettings.from_dict(_json_object(text, "settings")["settings"])
