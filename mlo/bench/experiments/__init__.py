"""The experiments: what is run, each yields records."""

from __future__ import annotations

from collections.abc import Callable

from mlo.bench.experiments import accuracy, chains, convergence, memory, overhead
from mlo.bench.experiments.settings import Settings, Task

_MODULES = (accuracy, chains, overhead, memory, convergence)

#: From settings to tasks, by the experiments' names.
EXPERIMENTS: dict[str, Callable[[Settings], list[Task]]] = {m.NAME: m.tasks for m in _MODULES}

#: What each is for, in one line.
SUMMARIES: dict[str, str] = {m.NAME: m.SUMMARY for m in _MODULES}
