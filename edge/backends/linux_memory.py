"""This process' memory on Linux: pages that nobody needs are returned, those of weights become huge pages.

- A stock llama.cpp clears a whole KV cache when it creates one, so the system provides pages for KV cells
  that most requests never reach; ours does not touch it (edge/csrc/pages.cpp). A private page of zeros still
  reads as zeros after it was returned.
- llama.cpp repacks most weights into memory of its own and keeps the pages of the mapped file beside them.
- Decoding reads all weights for each token. In pages of 4 KiB those are more than a processor's TLB covers.
  llama.cpp's weights are allocated in huge pages (edge/csrc/pages.cpp); onnxruntime does not ask for any.

On other systems all functions do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

AVAILABLE = sys.platform == "linux"
# Smaller ranges are not worth the look; other threads allocate none that are as large meanwhile.
_MIN_RANGE = 2**27
_CHUNK = 2**22
_HUGE_PAGE = 2**21
# Arguments of madvise. MADV_COLLAPSE joins pages at once, or fails (before Linux 6.1).
_MADV_DONTNEED, _MADV_COLLAPSE = 4, 25
# mallopt: allocations below 32 MiB lie side by side instead of in mappings of their own. That is the largest
# threshold that glibc would choose by itself.
_M_MMAP_THRESHOLD, _THRESHOLD = -3, 2**25


@contextlib.contextmanager
def return_zero_pages() -> Iterator[None]:
    """Return the pages of zeros of what is allocated within the block."""
    if not AVAILABLE:
        yield
        return
    before = _anonymous()
    yield
    libc, zeros = _libc(), bytes(_CHUNK)
    resident = (ctypes.c_ubyte * (_CHUNK // mmap.PAGESIZE))()
    for start, end in _added(before, _anonymous()):
        if end - start >= _MIN_RANGE:
            # Whole chunks only: huge pages are returned as they were taken.
            for chunk in range(-(-start // _CHUNK) * _CHUNK, end - _CHUNK + 1, _CHUNK):
                # To read pages that were never touched would cost as much as to clear them.
                if libc.mincore(chunk, _CHUNK, resident) == 0 and not any(resident):
                    continue
                if libc.memcmp(chunk, zeros, _CHUNK) == 0:
                    libc.madvise(chunk, _CHUNK, _MADV_DONTNEED)


@contextlib.contextmanager
def use_huge_pages() -> Iterator[None]:
    """Move what is allocated within the block, and still there at its end, to huge pages where possible.

    A huge page of which a part is not in use is left alone: no more memory is taken than before.
    """
    if not AVAILABLE:
        yield
        return
    libc = _libc()
    # musl has no mallopt.
    with contextlib.suppress(AttributeError):
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
    before = _anonymous(heap=True)
    yield
    resident = (ctypes.c_ubyte * (_HUGE_PAGE // mmap.PAGESIZE))()
    for start, stop in _added(before, _anonymous(heap=True)):
        # Neighbours share a call, because each call waits for all processors.
        begin = end = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        while end + _HUGE_PAGE <= stop:
            if libc.mincore(end, _HUGE_PAGE, resident) != 0 or not all(resident):
                libc.madvise(begin, end - begin, _MADV_COLLAPSE)
                begin = end + _HUGE_PAGE
            end += _HUGE_PAGE
        libc.madvise(begin, end - begin, _MADV_COLLAPSE)


def drop_file_pages(files: Iterable[Path]) -> int:
    """Drop the resident pages of mapped files; returns the mapped bytes. Pages that are read come back."""
    if not AVAILABLE:
        return 0
    names = {os.fsencode(file.resolve()) for file in files}
    libc = _libc()
    mapped = 0
    for start, end, _, _, path in _mappings():
        if path in names:
            libc.madvise(start, end - start, _MADV_DONTNEED)
            mapped += end - start
    return mapped


def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
    return libc


def _mappings() -> list[tuple[int, int, bytes, bytes, bytes]]:
    """(start, end, rights, inode, path or nothing) of each mapping, lowest first; empty without /proc."""
    try:
        lines = Path("/proc/self/maps").read_bytes().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        place, rights, _, _, inode, path = [*line.split(maxsplit=5), b""][:6]
        start, _, end = place.partition(b"-")
        rows.append((int(start, 16), int(end, 16), rights, inode, path))
    return rows


def _anonymous(*, heap: bool = False) -> list[tuple[int, int]]:
    """(start, end) of private memory without a file, lowest first. heap: the program's heap included."""
    return [
        (start, end)
        for start, end, rights, inode, path in _mappings()
        if rights == b"rw-p" and inode == b"0" and (not path or (heap and path == b"[heap]"))
    ]


def _added(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of the ranges `after` that lie in no range of `before`; both are in order."""
    for start, end in after:
        for old_start, old_end in before:
            if old_start < end and old_end > start:
                if start < old_start:
                    yield start, old_start
                start = max(start, old_end)
        if start < end:
            yield start, end
