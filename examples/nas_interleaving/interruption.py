"""An end that is asked for: by Ctrl-C, or by SIGTERM as `kill`, containers and batch systems send it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived. Whatever handles Ctrl-C handles it alike."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` when SIGTERM arrives."""
    if threading.current_thread() is not threading.main_thread():  # no other may choose what signals do
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def exit_status(interruption: KeyboardInterrupt) -> int:
    """Return what a shell expects: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT)
