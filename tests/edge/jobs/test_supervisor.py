"""What the supervisor runs for a verb."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from edge.jobs import job as job_module
from edge.jobs import supervisor
from edge.jobs.job import start


def test_a_verb_is_this_installations() -> None:
    wanted = [sys.executable, "-m", "edge.cli", "pull", "x", "--progress", "json"]
    assert supervisor.command(["edge", "pull", "x"]) == wanted
    assert supervisor.command(["true"]) == ["true"]


@pytest.mark.slow
def test_a_verb_writes_progress_and_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    job = start(tmp_path / "jobs", ["edge", "merge", "nowhere"], cwd=tmp_path)
    end = time.monotonic() + 60
    while job.state != "failed":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "nowhere" in job.last_line["error"] and job.last_line["exit_code"] == 1
    assert job.log().startswith("error: ")
    for process in job_module._started:
        process.wait(30)
