"""Memory that was taken and cleared before it is needed: given back until something is written there.

llama.cpp clears a whole KV cache when it makes one, so that the system gives pages for cells that most texts
never reach. A private page of zeros reads as zeros after it was let go of. Linux alone tells which they are.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

WORKS = sys.platform == "linux"
# Smaller pieces are not worth the look; larger than any that other threads take meanwhile.
_LEAST = 2**27
_CHUNK = 2**22
_DONTNEED = 4


@contextmanager
def given_back() -> Iterator[None]:
    """Give back the pages of zeros of what is allotted within."""
    if not WORKS:
        yield
        return
    before = _private()
    yield
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for begin, end in _private():
        for start, stop in _without(begin, end, before):
            if stop - start < _LEAST:
                continue
            # Whole chunks alone: huge pages are given back as they were taken.
            for at in range(-(-start // _CHUNK) * _CHUNK, stop - _CHUNK + 1, _CHUNK):
                piece = np.ctypeslib.as_array((ctypes.c_uint64 * (_CHUNK // 8)).from_address(at))
                if not piece.any():
                    libc.madvise(at, _CHUNK, _DONTNEED)


def _private() -> list[tuple[int, int]]:
    """Where this process' private memory without a file lies: (begin, end), the lowest first."""
    found = []
    try:
        lines = Path(f"/proc/{os.getpid()}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        place, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and not name:
            begin, _, end = place.partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _without(begin: int, end: int, others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pieces of a range that lie in none of `others`, which are in order."""
    pieces = []
    for start, stop in others:
        if start < end and stop > begin:
            if begin < start:
                pieces.append((begin, start))
            begin = max(begin, stop)
    return [*pieces, (begin, end)] if begin < end else pieces
