"""`edge tune` as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny_llama


@pytest.mark.slow
def test_edge_tune_shows_a_table(tmp_path: Path) -> None:
    run = tiny_llama.publish(tmp_path / "运行 run")
    done = subprocess.run(
        [sys.executable, "-m", "edge.cli", "tune", str(run), "--threads", "1"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "taken" in done.stdout
