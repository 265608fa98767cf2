"""Ctrl-C and SIGTERM during training: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from edge.console import STOP_SIGNALS, handling


@contextlib.contextmanager
def asked_to_stop(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a signal came; `say` gets a line when the first one does."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        say("stopping: a checkpoint is written (Ctrl-C again: stop without it)")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    with handling(STOP_SIGNALS, handle):
        yield asked.is_set
