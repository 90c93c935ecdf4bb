"""How far the work in a folder has come, and how it ended."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from examples.nas_interleaving.run_folder import STATUS, RunFolder

if TYPE_CHECKING:
    from typing_extensions import Self

RUNNING = "running"
COMPLETE = "complete"
INTERRUPTED = "interrupted"
FAILED = "failed"


class Tracker:
    """Keeps a folder's status current: running inside its `with` block; complete, interrupted or failed after it.

    Args:
        folder: where the status is written.
        counted: what the work is counted in; the name of the count in the file.

    Attributes:
        state: one of the four above.

    """

    def __init__(self, folder: RunFolder, counted: str) -> None:
        self._folder = folder
        self._counted = counted
        self._done = 0
        self._facts: dict[str, Any] = {}
        self.state = RUNNING
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        """Say that the work is running."""
        self._write()
        return self

    def count(self, done: int) -> None:
        """Say how much is done."""
        self._done = done
        self._write()

    def note(self, **facts: Any) -> None:
        """Say what else there is to know of the work, from the next time that it is written."""
        self._facts |= facts

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say how the work ended."""
        if kind is None:
            self.state = COMPLETE
        else:
            self.state = INTERRUPTED if issubclass(kind, KeyboardInterrupt) else FAILED
        self._write()

    def _write(self) -> None:
        seconds = round(time.perf_counter() - self._started, 3)
        self._folder.write_json(
            STATUS, {"state": self.state, self._counted: self._done, "seconds": seconds, **self._facts}
        )


def describe(state: str) -> str:
    """Return a state in words: what was killed could not say so, and still seems to run."""
    return "running, or killed," if state == RUNNING else state
