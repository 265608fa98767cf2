"""Pages of zeros are given back, those of weights are made large, and what was there before is left alone."""

from __future__ import annotations

import mmap
import platform
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from edge.backends import linux_pages


@pytest.mark.skipif(sys.platform != "linux", reason="says which memory is whose on Linux alone")
def test_cleared_memory_is_given_back_until_it_is_written_to() -> None:
    size, process = 2**28, psutil.Process()
    before = process.memory_info().rss
    with linux_pages.given_back():
        taken = np.full(size // 8, 7, np.uint64)
        taken[: size // 16] = 0
    assert process.memory_info().rss - before == pytest.approx(size // 2, abs=2**25)
    assert not taken[: size // 16].any() and (taken[size // 16 :] == 7).all()
    taken[:100] = 5
    assert taken[:101].sum() == 500
    # What was there before is left alone.
    assert linux_pages._without(10, 50, [(0, 12), (20, 30), (45, 60)]) == [(12, 20), (30, 45)]
    assert linux_pages._without(10, 50, [(0, 90)]) == []


def _in_large_pages() -> int:
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="no large pages to be had for the asking",
)
@pytest.mark.skipif(
    sys.platform == "linux" and tuple(map(int, platform.release().split(".")[:2])) < (6, 1),
    reason="Linux moves pages together since 6.1",
)
def test_weights_are_moved_to_large_pages_and_nothing_that_is_not_in_use() -> None:
    size, process = 2**26, psutil.Process()

    def taken() -> mmap.mmap:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    older = taken()
    older[:] = b"5" * size
    before = _in_large_pages()
    with linux_pages.made_large():
        whole, half = taken(), taken()
        whole[:] = b"7" * size
        # Every other page: none of it may be filled up.
        for at in range(0, size, 8192):
            half[at] = 1
        resident = process.memory_info().rss
    # Where memory is in pieces the system may not find all.
    assert size // 2 < _in_large_pages() - before < size + 2**23
    assert process.memory_info().rss - resident < 2**22
    assert whole[:] == b"7" * size and older[:] == b"5" * size and half[8192] == 1 and half[4096] == 0
