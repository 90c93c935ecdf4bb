"""The metrics of a search for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from examples.nas_interleaving.genotype import CELL_KINDS
from examples.nas_interleaving.operations import OPERATION_NAMES
from examples.nas_interleaving.options import SettingsError
from examples.nas_interleaving.run_folder import METRICS, WEIGHTS, RunFolder

EVENTS = "tensorboard"


def write_events(folder: RunFolder) -> None:
    """Write all that changes over the steps of a search as event files, into a folder of its own inside the run's.

    Raises:
        SettingsError: the package tensorboard is missing.

    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (a package that only this needs)
    except ImportError as error:
        raise SettingsError(
            f"tensorboard: the package cannot be imported ({error}). Install it (pip install tensorboard), or leave "
            "the option out: the report shows the same."
        ) from error
    events = folder.new_part(EVENTS)
    with SummaryWriter(str(events.path)) as writer:
        for file, values in ((METRICS, _metrics), (WEIGHTS, _weights)):
            for line in folder.read_lines(file) if folder.has(file) else ():
                for name, value in values(line):
                    writer.add_scalar(name, value, line["step"])


def _metrics(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    problem = line["problem"]
    for name in ("loss", "gradient_norm", "learning_rate"):
        if line[name] is not None:
            yield f"{problem}/{name}", line[name]
    for group in ("metrics", "validation"):
        for name, value in (line[group] or {}).items():
            yield f"{problem}/{group}/{name}", value


def _weights(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for kind in CELL_KINDS:
        for edge, row in enumerate(line[kind]):
            for name, value in zip(OPERATION_NAMES, row, strict=True):
                yield f"weights/{kind}/edge_{edge}/{name}", value
