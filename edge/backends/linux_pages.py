"""Pages of this process' memory, on Linux: those of zeros are given back, those of weights are made large.

llama.cpp clears a whole KV cache when it makes one, so that the system gives pages for cells that most texts
never reach. A private page of zeros reads as zeros after it was let go of.

Decoding reads all weights for each token: in pages of 4 KiB those are more than a processor remembers the
places of. llama.cpp's weights are laid into large ones where they are made (edge/csrc/pages.cpp); onnxruntime
does not ask for any.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WORKS = sys.platform == "linux"
# Smaller pieces are not worth the look; larger than any that other threads take meanwhile.
_LEAST = 2**27
_CHUNK = 2**22
_LARGE = 2**21
# Of madvise. The second one moves pages together at once, or fails (before Linux 6.1).
_DONTNEED, _COLLAPSE = 4, 25
# Of mallopt: what is smaller lies side by side, not in maps of its own. glibc may go up to it by itself.
_MMAP_THRESHOLD, _SMALLER = -3, 2**25


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Give back the pages of zeros of what is allotted within."""
    if not WORKS:
        yield
        return
    before = _private()
    yield
    libc = _libc()
    for start, stop in _fresh(before, _private()):
        if stop - start < _LEAST:
            continue
        # Whole chunks alone: huge pages are given back as they were taken.
        for at in range(-(-start // _CHUNK) * _CHUNK, stop - _CHUNK + 1, _CHUNK):
            piece = np.ctypeslib.as_array((ctypes.c_uint64 * (_CHUNK // 8)).from_address(at))
            if not piece.any():
                libc.madvise(at, _CHUNK, _DONTNEED)


@contextlib.contextmanager
def made_large() -> Iterator[None]:
    """Move what is allotted within, and still there at the end, to pages of 2 MiB where the system can.

    Where a part of one is not in use, nothing is changed: no more memory is taken than before.
    """
    if not WORKS:
        yield
        return
    libc = _libc()
    # Other libraries than glibc have none.
    with contextlib.suppress(AttributeError):
        libc.mallopt(_MMAP_THRESHOLD, _SMALLER)
    before = _private(heap=True)
    yield
    resident = (ctypes.c_ubyte * (_LARGE // os.sysconf("SC_PAGE_SIZE")))()
    for start, stop in _fresh(before, _private(heap=True)):
        # Neighbours in one call, each of which waits for all processors.
        begin = end = -(-start // _LARGE) * _LARGE
        while end + _LARGE <= stop:
            if libc.mincore(end, _LARGE, resident) != 0 or not all(resident):
                libc.madvise(begin, end - begin, _COLLAPSE)
                begin = end + _LARGE
            end += _LARGE
        libc.madvise(begin, end - begin, _COLLAPSE)


def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return libc


def _private(*, heap: bool = False) -> list[tuple[int, int]]:
    """Where this process' private memory without a file lies: (begin, end), the lowest first.

    heap: the one that grows at the program's end too.
    """
    found = []
    try:
        lines = Path(f"/proc/{os.getpid()}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        place, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or (heap and name == ["[heap]"])):
            begin, _, end = place.partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _fresh(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The pieces of `after` that lie in none of `before`; both are in order."""
    for begin, end in after:
        yield from _without(begin, end, before)


def _without(begin: int, end: int, others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pieces of a range that lie in none of `others`, which are in order."""
    pieces = []
    for start, stop in others:
        if start < end and stop > begin:
            if begin < start:
                pieces.append((begin, start))
            begin = max(begin, stop)
    return [*pieces, (begin, end)] if begin < end else pieces
