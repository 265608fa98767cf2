"""What a process holds of a file that it has mapped, given back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_DONTNEED = 4  # MADV_DONTNEED


def let_go(files: Iterable[Path]) -> int:
    """Drop the resident pages of mapped files; the bytes that are mapped. What is read again comes back.

    llama.cpp repacks most weights into memory of its own and keeps the file's pages beside them. Linux only:
    elsewhere nothing is done, and 0 is given.
    """
    if sys.platform != "linux":
        return 0
    names = {os.fsencode(file.resolve()) for file in files}
    libc = ctypes.CDLL(None)
    found = 0
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names:
            start, end = (int(one, 16) for one in fields[0].split(b"-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
            found += end - start
    return found
