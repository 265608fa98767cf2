"""Zero pages and pages of mapped files are returned, weights move to huge pages, the rest is left alone."""

from __future__ import annotations

import mmap
import platform
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from edge.backends import linux_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="does nothing on other systems")


@pytest.mark.slow
def test_cleared_memory_is_returned_until_it_is_written_to() -> None:
    size, process = 2**28, psutil.Process()
    before = process.memory_info().rss
    with linux_memory.return_zero_pages():
        taken = np.full(size // 8, 7, np.uint64)
        taken[: size // 16] = 0
    assert process.memory_info().rss - before == pytest.approx(size // 2, abs=2**25)
    assert not taken[: size // 16].any() and (taken[size // 16 :] == 7).all()
    taken[:100] = 5
    assert taken[:101].sum() == 500


def test_only_what_was_added_is_looked_at() -> None:
    assert list(linux_memory._added([(0, 12), (20, 30), (45, 60)], [(10, 50)])) == [(12, 20), (30, 45)]
    assert list(linux_memory._added([(0, 90)], [(10, 50)])) == []


def test_pages_of_a_mapped_file_are_dropped_and_read_again(tmp_path: Path) -> None:
    size = 64 * 2**20
    path = tmp_path / "权重 w.bin"
    path.write_bytes(b"7" * size)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert data[:].count(b"7") == size
        before = psutil.Process().memory_info().shared
        assert linux_memory.drop_file_pages([path]) >= size
        assert before - psutil.Process().memory_info().shared > size * 0.9
        assert data[:].count(b"7") == size
    assert linux_memory.drop_file_pages([path, tmp_path / "none"]) == 0


def _in_huge_pages() -> int:
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="the kernel has no transparent huge pages",
)
@pytest.mark.skipif(
    sys.platform == "linux" and tuple(map(int, platform.release().split(".")[:2])) < (6, 1),
    reason="Linux joins pages on request since 6.1",
)
def test_weights_move_to_huge_pages_and_unused_memory_does_not() -> None:
    size, process = 2**26, psutil.Process()

    def allocate() -> mmap.mmap:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    older = allocate()
    older[:] = b"5" * size
    before = _in_huge_pages()
    with linux_memory.use_huge_pages():
        whole, half = allocate(), allocate()
        whole[:] = b"7" * size
        # Every other page: none of it may be filled up.
        for at in range(0, size, 8192):
            half[at] = 1
        resident = process.memory_info().rss
    # Where memory is fragmented the system may not find all.
    assert size // 2 < _in_huge_pages() - before < size + 2**23
    assert process.memory_info().rss - resident < 2**22
    assert whole[:] == b"7" * size and older[:] == b"5" * size and half[8192] == 1 and half[4096] == 0
