"""`RunFolder`: everything that a run leaves on disk."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import mlo
from examples.nas_interleaving.genotype import Genotype
from examples.nas_interleaving.settings import SearchSettings, Settings, SettingsError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
WEIGHTS = "architecture.jsonl"
GENOTYPE = "genotype.json"
STATUS = "status.json"
RESULTS = "results.jsonl"
TABLE = "table.md"


class RunFolderError(ValueError):
    """A folder cannot be written, or is not one of a run."""


class RunFolder:
    """A folder with one file for each kind of result.

    Lines are flushed as they are written and whole files are replaced in one operation, so that an interruption
    at any moment leaves every file readable.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Make a new folder.

        Raises:
            RunFolderError: there is something at this place.

        """
        folder = cls(path)
        if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
            raise RunFolderError(f"{path} exists and is not empty; expected a new folder, so that no run is lost.")
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    def write_text(self, name: str, text: str) -> None:
        """Write a file as a whole."""
        unfinished = self.path / f".{name}.unfinished"
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON."""
        self.write_text(name, json.dumps(value, indent=2))

    def append(self, name: str, *lines: Mapping[str, Any]) -> None:
        """Add JSON lines to a file."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def read_lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Return the JSON lines of a file."""
        with (self.path / name).open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def new_part(self, name: str) -> RunFolder:
        """Make a folder inside this one, with a number behind its name if the name is taken."""
        taken = sum(1 for found in self.path.glob(f"{name}*") if found.is_dir())
        return RunFolder.create(self.path / (name if taken == 0 else f"{name}_{taken + 1}"))

    def write_config(self, settings: Settings) -> None:
        """Write the settings, and what else a run depends on."""
        self.write_json(
            CONFIG,
            {
                "settings": asdict(settings),
                "command": sys.argv[1:],
                "versions": {"python": platform.python_version(), "torch": torch.__version__, "mlo": mlo.__version__},
                "threads": torch.get_num_threads(),
            },
        )

    def read_search_settings(self) -> SearchSettings:
        """Return the settings of the search in this folder."""
        return SearchSettings.from_dict(self._read(CONFIG, json.loads)["settings"])

    def read_genotype(self) -> Genotype:
        """Return the architecture that was found."""
        return self._read(GENOTYPE, Genotype.from_json)

    def read_status(self) -> dict[str, Any]:
        """Return how far the search has come."""
        return self._read(STATUS, json.loads)

    def _read(self, name: str, parse: Any) -> Any:
        file = self.path / name
        try:
            return parse(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunFolderError(f"{file} does not exist; expected the folder of a search.") from None
        except (ValueError, KeyError) as error:
            if isinstance(error, SettingsError):
                raise
            raise RunFolderError(f"{file} cannot be read: {error}") from error
