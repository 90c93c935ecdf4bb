"""Records: what was measured, one JSON object a line, each with the environment that it was measured in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mlo
from mlo.errors import ConfigurationError

Record = dict[str, Any]

#: What every record has, beside what its experiment adds.
FIELDS = (
    "experiment",
    "problem",
    "size",
    "library",
    "version",
    "method",
    "budget",
    "dtype",
    "device",
    "threads",
    "seed",
    "error",
    "seconds",
    "reverse_passes",
    "memory_bytes",
    "warnings",
    "failure",
    "environment",
)


def completed(record: Record, environment: Record) -> Record:
    """Return a record with all fields, in their order; those that it lacks are `None`."""
    extra = {key: value for key, value in record.items() if key not in FIELDS}
    full = {**dict.fromkeys(FIELDS), **record, "environment": environment}
    return {**{key: full[key] for key in FIELDS}, **extra}


def environment(device: torch.device) -> Record:
    """Return versions, machine and commit."""
    return {
        "mlo": mlo.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": _version("scikit-learn"),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": _cores(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def append(path: Path, record: Record) -> None:
    """Add a line to a file, so that nothing is lost when the run ends early."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def read(paths: Iterable[Path]) -> list[Record]:
    """Return the records of some files.

    Raises:
        ConfigurationError: a file does not exist, or a line is not a record.

    """
    return [record for path in paths for record in _records_of(path)]


def _records_of(path: Path) -> Iterator[Record]:
    if not path.is_file():
        raise ConfigurationError(
            f"report: expected a file of records at {path}, which does not exist. Make one with "
            f"`python -m mlo.bench run --output {path}`."
        )
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigurationError(
                f"{path}, line {number}: expected a record as JSON ({error}). Remove a line that was cut off."
            ) from error
        missing = [key for key in FIELDS if not isinstance(record, dict) or key not in record]
        if missing:
            raise ConfigurationError(
                f"{path}, line {number}: expected a record of `python -m mlo.bench run`; it lacks {', '.join(missing)}."
            )
        yield record


def _commit() -> str | None:
    """Return the commit of the source tree that `mlo` is imported from, with "+" where files differ from it."""
    folder = Path(mlo.__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
