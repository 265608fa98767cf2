"""Pages of a mapped file are given back, and come again when they are read."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import psutil
import pytest

from edge.backends import linux_mapped


@pytest.mark.skipif(sys.platform != "linux", reason="other systems let nothing go")
def test_a_mapped_file_is_let_go_and_read_again(tmp_path: Path) -> None:
    size = 64 * 2**20
    path = tmp_path / "权重 w.bin"
    path.write_bytes(b"7" * size)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert data[:].count(b"7") == size
        before = psutil.Process().memory_info().shared
        assert linux_mapped.let_go([path]) >= size
        assert before - psutil.Process().memory_info().shared > size * 0.9
        assert data[:].count(b"7") == size
    assert linux_mapped.let_go([path, tmp_path / "none"]) == 0
