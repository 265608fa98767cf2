"""What the supervisor runs for a verb."""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge.artefact import json_file
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


@pytest.mark.slow
def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failures = json_file.write, [OSError(errno.ENOSPC, "full"), OSError(errno.ENOSPC, "full")]

    def full(path: Path, data: dict[str, Any]) -> None:
        if failures:
            raise failures.pop()
        write(path, data)

    monkeypatch.setattr(json_file, "write", full)
    supervisor.record(tmp_path / "state.json", {"exit_code": 1})
    assert failures == [] and json_file.read(tmp_path / "state.json") == {"exit_code": 1}
    failures.append(OSError(errno.EACCES, "denied"))
    with pytest.raises(OSError, match="denied"):
        supervisor.record(tmp_path / "state.json", {})
