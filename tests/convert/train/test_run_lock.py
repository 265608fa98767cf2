"""Two trainings never share a run folder, and a killed one keeps nobody out."""

import json
import os
import platform
import subprocess
import sys

import psutil
import pytest

from convert.train import run_lock
from edge.errors import ExistsError


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(run, **owner):
    run.mkdir(parents=True, exist_ok=True)
    here = {"pid": os.getpid(), "host": platform.node(), "started": psutil.Process().create_time()}
    (run / run_lock.FILE).write_text(json.dumps(here | owner), encoding="utf-8")


def test_the_second_is_refused_by_process_and_host(tmp_path):
    run = tmp_path / "跑 1"
    with run_lock.hold(run):
        words = f"process {os.getpid()} on {platform.node()} trains in .*跑 1"
        with pytest.raises(ExistsError, match=words), run_lock.hold(run):
            pass
        assert (run / run_lock.FILE).is_file()
    assert not run.exists()
    with run_lock.hold(run):
        (run / "log").touch()
    assert [path.name for path in run.iterdir()] == ["log"]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, dead):
    write(tmp_path, pid=dead)
    with run_lock.hold(tmp_path):
        owner = json.loads((tmp_path / run_lock.FILE).read_text(encoding="utf-8"))
        assert owner["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_with_the_same_number_holds_nothing(tmp_path):
    write(tmp_path, started=1.0)
    with run_lock.hold(tmp_path):
        pass


def test_another_host_is_believed(tmp_path, dead):
    write(tmp_path, pid=dead, host="elsewhere")
    with pytest.raises(ExistsError, match=f"process {dead} on elsewhere") as caught, run_lock.hold(tmp_path):
        pass
    assert "if it is gone, delete" in str(caught.value) and (tmp_path / run_lock.FILE).is_file()


def test_a_lock_without_text_holds_only_while_it_is_young(tmp_path):
    path = tmp_path / run_lock.FILE
    path.touch()
    with pytest.raises(ExistsError, match="another training begins"), run_lock.hold(tmp_path):
        pass
    os.utime(path, (1, 1))
    with run_lock.hold(tmp_path):
        pass


def test_later_processes_of_one_training_take_no_lock(tmp_path, monkeypatch):
    with run_lock.hold(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with run_lock.hold(tmp_path):
            pass


def test_partial_checkpoints_of_killed_trainings_are_swept(tmp_path, dead):
    for name in (f".checkpoint-4.partial-{dead}", "checkpoint-2"):
        (tmp_path / name).mkdir()
    with run_lock.hold(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_file_in_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ExistsError, match=r"output_dir: .*run is a file"), run_lock.hold(tmp_path / "run"):
        pass
