"""A cell of a table: one row with one seed, searched, retrained and tested in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from examples.nas_interleaving.data.settings import DataSettings
from examples.nas_interleaving.outlier import load
from examples.nas_interleaving.retrain import retrain
from examples.nas_interleaving.run_folder import RESULTS, STATUS, RunFolder
from examples.nas_interleaving.search import search
from examples.nas_interleaving.search_settings import SearchSettings
from examples.nas_interleaving.settings import RetrainSettings
from examples.nas_interleaving.status import COMPLETE, Tracker


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        label: its row.
        seed: its seed.
        searches: settings of its searches; the architecture of each is tested on the tasks of that search.

    """

    label: str
    seed: int
    searches: tuple[SearchSettings, ...]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{re.sub(r'[^A-Za-z0-9._=-]+', '_', self.label)}-seed_{self.seed}"

    def is_done(self, folder: RunFolder) -> bool:
        """Return whether everything in its folder is there."""
        return folder.has(STATUS) and folder.read_json(STATUS).get("state") == COMPLETE

    def results(self, folder: RunFolder) -> list[dict[str, Any]]:
        """Return the test results of a cell that is done."""
        return list(folder.read_lines(RESULTS))

    def run(self, folder: RunFolder, data: DataSettings, retraining: RetrainSettings, tested: Sequence[str]) -> None:
        """Search, retrain and test.

        Args:
            folder: new, for all that the cell leaves.
            data: of all tasks.
            retraining: of the networks.
            tested: the tasks whose tests count; others only take part in searches.

        """
        with Tracker(folder, "networks") as status:
            found = []
            for settings in self.searches:
                part = folder.new_part("search")
                tasks = load(settings.tasks, data)
                title = f"search, {self.label}, seed {self.seed}"
                genotype = search(part, tasks, settings, data, title=title, draw=False)
                found.append((genotype, [task for task in tasks if task.name in tested], part.read_status()))
            cost = {
                "search_seconds": sum(how["seconds"] for _, _, how in found),
                "search_passes": sum(sum(how.get("passes", {}).values()) for _, _, how in found),
                "search_steps": found[0][2]["steps"],
            }
            for genotype, tasks, _ in found:
                for task in tasks:
                    title = f"retrain, {self.label}, {task.name}, seed {self.seed}"
                    result = asdict(retrain(genotype, task, retraining, self.seed, title=title))
                    folder.append(RESULTS, {"architecture": self.label, "seed": self.seed, **cost, **result})
                    status.count(len(self.results(folder)))
