"""Several processes for one table."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch

from examples.nas_interleaving.interruption import exit_status, terminable
from examples.nas_interleaving.run_folder import RunFolderError
from examples.nas_interleaving.table_folder import TableFolder


def work_in_processes(table: TableFolder, jobs: int) -> None:
    """Work on a table in several processes, with one thread each; their progress goes to `worker_N.log`.

    Raises:
        RunFolderError: one of them has failed; the others went on.

    """
    context = multiprocessing.get_context("spawn")
    path = table.folder.path
    workers = [context.Process(target=_work, args=(path, number)) for number in range(1, jobs + 1)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
                worker.join()
    failed = [str(_log(path, n)) for n, worker in enumerate(workers, 1) if worker.exitcode]
    if failed:
        raise RunFolderError(f"a process has failed; see the end of {', '.join(failed)}. The same command goes on.")


def _log(path: Path, number: int) -> Path:
    return path / f"worker_{number}.log"


def _work(path: Path, number: int) -> None:
    log = os.open(_log(path, number), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stderr.fileno())
    torch.set_num_threads(1)
    try:
        with terminable():
            TableFolder(path).work(lambda text: print(text, flush=True))
    except KeyboardInterrupt as interruption:
        sys.exit(exit_status(interruption))
