"""The folder of a table, on which several processes can work, now or later."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from examples.nas_interleaving.cells import Cell
from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.options import Kind, SettingsError
from examples.nas_interleaving.run_folder import CONFIG, RESULTS, TABLE, RunFolder, RunFolderError
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.table_settings import AblateSettings, CompareSettings
from examples.nas_interleaving.tables import make_table, make_verdict
from examples.nas_interleaving.variants import ablated, compared

_CELLS = "cells"
_LOCKS = "locks"


@dataclass(frozen=True)
class TablePlan:
    """All that a table depends on.

    Attributes:
        table: what is compared.
        search: settings that all searches share.
        counted: the same, counted in steps, by which budgets are made equal.
        retraining: of the networks.
        data: of all tasks.

    """

    table: CompareSettings | AblateSettings
    search: SearchSettings
    counted: SearchSettings
    retraining: RetrainSettings
    data: DataSettings

    def cells(self) -> list[Cell]:
        """Return the cells, seed by seed, so that whole columns are there first.

        Raises:
            SettingsError: a row cannot be understood, or its settings do not go together.

        """
        table = self.table
        variants = compared(table) if isinstance(table, CompareSettings) else ablated(table, self.counted)
        return [
            Cell(variant.label, seed, tuple(variant.searches(self.counted, table.budget, seed)))
            for seed in table.seeds
            for variant in variants
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in JSON's types."""
        kind = "compare" if isinstance(self.table, CompareSettings) else "ablate"
        return {
            "kind": kind,
            "table": asdict(self.table),
            "search": asdict(self.search),
            "counted": asdict(self.counted),
            "retraining": asdict(self.retraining),
            "data": asdict(self.data),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TablePlan:
        """Read a plan.

        Raises:
            ValueError: it is none.

        """
        kinds: dict[str, type[CompareSettings | AblateSettings]] = {
            "compare": CompareSettings,
            "ablate": AblateSettings,
        }
        try:
            return cls(
                kinds[values["kind"]].from_dict(values["table"]),
                SearchSettings.from_dict(values["search"]),
                SearchSettings.from_dict(values["counted"]),
                RetrainSettings.from_dict(values["retraining"]),
                DataSettings.from_dict(values["data"]),
            )
        except KeyError as error:
            raise ValueError(f"expected the settings of a table, found no {error}.") from error


class TableFolder:
    """The folder of a table: its plan, a folder for each cell, results and table.

    Whoever works on a cell holds its lock, which the system gives back when a process ends, however it does. A cell
    that is not complete while nobody holds its lock was left by a process that ended: it is done anew.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(path)

    @property
    def exists(self) -> bool:
        """Whether there is a plan in the folder."""
        return self.folder.path.is_dir() and self.folder.has(CONFIG)

    def read_plan(self) -> TablePlan:
        """Return the stored plan.

        Raises:
            RunFolderError: there is none, or it cannot be read.

        """
        found = self.folder.read_json(CONFIG)
        try:
            return TablePlan.from_dict(found)
        except (ValueError, TypeError) as error:
            raise RunFolderError(f"{self.folder.path / CONFIG} cannot be read: {error}") from error

    def create(self, plan: TablePlan) -> None:
        """Make the folder."""
        RunFolder.create(self.folder.path)
        (self.folder.path / _LOCKS).mkdir()
        (self.folder.path / _CELLS).mkdir()
        self.folder.write_json(CONFIG, plan.to_dict())

    def part(self, cell: Cell) -> RunFolder:
        """Return the folder of a cell."""
        return RunFolder(self.folder.path / _CELLS / cell.name)

    def is_done(self, cell: Cell) -> bool:
        """Return whether a cell is complete."""
        return cell.is_done(self.part(cell))

    @contextmanager
    def _held(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold a lock; say whether it is held."""
        lock = FileLock(self.folder.path / _LOCKS / f"{name}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def work(self, said: Callable[[str], None] = print) -> None:
        """Do all cells that are not done, and that nobody else does; the table is current after each."""
        plan = self.read_plan()
        cells = plan.cells()
        for cell in cells:
            with self._held(cell.name, wait=False) as held:
                if held and not self.is_done(cell):
                    self._run(cell, plan)
                    self.write_table()
                    said(f"{sum(map(self.is_done, cells))} of {len(cells)} cells are done; now {cell.name}.")

    def _run(self, cell: Cell, plan: TablePlan) -> None:
        place = self.part(cell).path
        if place.exists():
            shutil.rmtree(place)  # what a process that ended has left
        cell.run(RunFolder.create(place), plan.data, plan.retraining, plan.search.tasks)

    def results(self) -> list[dict[str, Any]]:
        """Return the results of all cells that are done, row by row."""
        cells = self.read_plan().cells()
        rows = {label: number for number, label in enumerate(dict.fromkeys(cell.label for cell in cells))}
        done = [cell for cell in cells if self.is_done(cell)]
        return [r for cell in sorted(done, key=lambda c: rows[c.label]) for r in cell.results(self.part(cell))]

    def summary(self) -> str:
        """Return the table, what it says, and how much of it is missing."""
        cells, results = self.read_plan().cells(), self.results()
        missing = sum(not self.is_done(cell) for cell in cells)
        note = f"This table is unfinished: {missing} of {len(cells)} cells are missing." if missing else ""
        if not results:
            return note
        return "\n\n".join(filter(None, [make_table(results), make_verdict(results), note]))

    def write_table(self) -> None:
        """Keep the results of all cells, and the table, in the folder."""
        with self._held("table", wait=True):
            lines = self.results()
            self.folder.write_lines(RESULTS, lines)
            self.folder.write_text(TABLE, self.summary())


def same_or_refused(stored: Kind, given: dict[str, Any]) -> None:
    """Raise an error for settings that were given and differ from those that are stored.

    Raises:
        SettingsError: there are such.

    """
    wanted = type(stored).from_dict({**asdict(stored), **given})
    for name in given:
        old, new = getattr(stored, name), getattr(wanted, name)
        if old != new:
            raise SettingsError(
                f"{name} = {new!r}: the table in this folder has {old!r}; expected the same settings to go on with "
                f"it. Leave {name} out, or give another folder."
            )
