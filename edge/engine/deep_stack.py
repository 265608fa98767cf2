"""Threads with room for the recursion of native code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

# llama.cpp's regular expressions and llguidance's references recurse over megabytes.
# Some systems give a thread half of one.
_BYTES = 2**26
# The size holds for the whole process.
_LOCK = threading.Lock()


@contextlib.contextmanager
def deep_stack() -> Iterator[None]:
    """Threads that are started within have a stack of 64 MiB."""
    with _LOCK:
        before = threading.stack_size(_BYTES)
        try:
            yield
        finally:
            threading.stack_size(before)
