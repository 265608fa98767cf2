"""Jobs live on disk and without whoever started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from edge.artefact import json_file
from edge.errors import EdgeError, InputError
from edge.jobs import job as job_module
from edge.jobs.job import Job, jobs, read, start

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    for supervisor in job_module._started:
        supervisor.wait(30)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


SLEEPS = python("import time; print('{\"step\": 1}', flush=True); time.sleep(60)")
# As a training: the first Ctrl-C makes it save, which takes a while.
SAVES = python(
    "import signal, sys, time\n"
    "def save(*_): print('{\"saved\": true}', flush=True); time.sleep(SAVING); sys.exit(130)\n"
    "signal.signal(signal.SIGINT, save)\n"
    "print('{\"step\": 1}', flush=True); time.sleep(60)"
)


def saving(seconds: float) -> list[str]:
    return [word.replace("SAVING", str(seconds)) for word in SAVES]


def test_a_job_runs_and_everything_is_kept(tmp_path: Path) -> None:
    code = "import os, sys; print('{\"cwd\": ' + repr(os.getcwd()).replace(chr(39), chr(34)) + '}')\n"
    code += "print('{\"result\": {}}'); print('词', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    work = tmp_path / "工作"
    work.mkdir()
    good, bad = (start(tmp_path / "jobs", [*python(code), str(n)], cwd=work) for n in (0, 3))
    until(lambda: good.state == "done" and bad.state == "failed")
    assert [job.name for job in jobs(tmp_path / "jobs")] == ["0001", "0002"]
    assert good.log() == "词\n" and bad.record["exit_code"] == 3
    lines, end = good.lines()
    assert lines == [{"cwd": str(work)}, {"result": {}}] and good.last_line == {"result": {}}
    assert good.lines(end) == ([], end)
    assert good.created <= good.record["started"] <= good.record["ended"]
    bad.delete()
    assert [job.name for job in jobs(tmp_path / "jobs")] == ["0001"]
    (tmp_path / "jobs" / "0000").mkdir()  # what is no job is passed over
    assert [job.name for job in jobs(tmp_path / "jobs")] == ["0001"]
    # The number is not given twice while a later one stands.
    assert start(tmp_path / "jobs", python("")).name == "0002"


@pytest.mark.slow
def test_one_job_a_device_at_a_time_in_their_order(tmp_path: Path) -> None:
    first = start(tmp_path, SLEEPS, device="cpu")
    second = start(tmp_path, python(""), device="cpu")
    third = start(tmp_path, python(""), device="cpu")
    other, free = start(tmp_path, python(""), device="cuda:0"), start(tmp_path, python(""))
    until(lambda: other.state == free.state == "done")
    until(lambda: first.state == "running")
    assert [second.state, third.state] == ["waiting", "waiting"]
    second.stop()
    until(lambda: second.state == "stopped")
    assert "started" not in second.record and third.state == "waiting"
    with pytest.raises(EdgeError, match="stop it first"):
        first.delete()
    first.stop()
    until(lambda: first.state == "stopped" and third.state == "done")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is another signal there")
def test_the_first_stop_lets_it_save_and_the_second_one_does_not_wait(tmp_path: Path) -> None:
    patient, stubborn = start(tmp_path, saving(0.3)), start(tmp_path, saving(60))
    for job in (patient, stubborn):
        until(lambda job=job: job.last_line == {"step": 1})
        job.stop()
    until(lambda: patient.state == "stopped")
    assert patient.record["exit_code"] == 130 and patient.last_line == {"saved": True}
    until(lambda: stubborn.last_line == {"saved": True})
    assert stubborn.state == "stopping"
    stubborn.stop()
    until(lambda: stubborn.state == "stopped")
    assert stubborn.record["exit_code"] == -signal.SIGKILL


STARTER = """
import sys, time
from pathlib import Path
from edge.jobs.job import start
start(Path(sys.argv[1]), sys.argv[2:])
time.sleep(60)
"""


@pytest.mark.slow
def test_a_killed_starter_leaves_the_job_running(tmp_path: Path) -> None:
    code = 'import time; time.sleep(1.5); print(\'{"result": {}, "exit_code": 0}\')'
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path), *python(code)])
    until(lambda: jobs(tmp_path) and jobs(tmp_path)[0].state == "running")
    starter.kill()
    starter.wait()
    [job] = jobs(tmp_path)
    assert job.state == "running"
    until(lambda: job.state == "done")
    assert job.record["exit_code"] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_what_is_left_without_a_supervisor(tmp_path: Path) -> None:
    end = 'import time; time.sleep(1); print(\'{"result": {}, "exit_code": 0}\')'
    finished, cut, stopped = (start(tmp_path, command) for command in (python(end), SLEEPS, saving(0)))
    for job in (finished, cut, stopped):
        until(lambda job=job: job.state == "running")
        os.kill(job.record["supervisor"]["pid"], signal.SIGKILL)
    # The verb goes on, ends by itself, and has said so.
    assert finished.state == "running"
    until(lambda: finished.state == "done")
    os.kill(cut.record["verb"]["pid"], signal.SIGKILL)
    until(lambda: cut.state == "lost")
    until(lambda: stopped.last_line == {"step": 1})
    stopped.stop()
    until(lambda: not psutil.pid_exists(stopped.record["verb"]["pid"]))
    assert stopped.last_line == {"saved": True}


def job_with(folder: Path, argv: list[str], **state: object) -> Job:
    folder.mkdir()
    json_file.write(
        folder / "job.json", {"argv": argv, "cwd": str(folder), "device": "", "created": time.time()}
    )
    if state:
        json_file.write(folder / "state.json", dict(state))
    return Job(folder)


def test_a_reboot_is_found_out_though_the_number_is_taken(tmp_path: Path) -> None:
    me = {"pid": os.getpid(), "began": psutil.Process().create_time()}
    before = {**me, "began": me["began"] - 100}
    assert job_with(tmp_path / "1", ["x"], supervisor=me, verb=me).state == "running"
    assert job_with(tmp_path / "2", ["x"], supervisor=before, verb=before).state == "lost"
    young, old = job_with(tmp_path / "3", ["x"]), job_with(tmp_path / "4", ["x"])
    old.created -= 3600
    assert (young.state, old.state) == ("waiting", "lost")


def test_a_training_goes_on_and_others_begin_anew(tmp_path: Path) -> None:
    training = job_with(tmp_path / "1", ["edge", "train", "a.yaml", "--overwrite"])
    assert training.again() == ["edge", "train", "a.yaml", "--resume"]
    assert job_with(tmp_path / "2", ["edge", "pull", "x/y"]).again() == ["edge", "pull", "x/y"]


def test_half_a_line_is_left_for_later(tmp_path: Path) -> None:
    job = job_with(tmp_path / "1", ["x"])
    assert job.lines() == ([], 0) and job.log() == "" and job.last_line == {}
    (tmp_path / "1" / "progress.jsonl").write_bytes(b'{"a": 1}\nnoise\n{"b"')
    assert job.lines() == ([{"a": 1}], 15)
    assert job.last_line == {"a": 1}


def test_what_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no job"):
        Job(tmp_path)
    (tmp_path / "job.json").write_text(json.dumps([1]), encoding="utf-8")
    assert read(tmp_path / "job.json") is None
