"""Runs tasks one after the other; what fails becomes a record that says why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from mlo.bench.experiments.measured import described
from mlo.bench.experiments.settings import Settings, Task
from mlo.bench.records import Record, completed, environment


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """Ctrl-C was pressed; the records up to there are complete."""


def run(tasks: Iterable[Task], settings: Settings) -> Iterator[Record]:
    """Yield complete records.

    Raises:
        Interrupted: on Ctrl-C.

    """
    around = environment(settings.device)
    try:
        for task in tasks:
            threads = settings.threads or task.threads
            head = {"device": str(settings.device), "threads": threads, **task.head}
            with _threads(threads):
                for record in _records(task):
                    yield completed({**head, **record}, around)
    except KeyboardInterrupt as error:
        raise Interrupted from error


def _records(task: Task) -> Iterator[Record]:
    try:
        yield from task.run()
    except Exception as error:  # one problem must not end the others
        yield {"failure": described(error)}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
