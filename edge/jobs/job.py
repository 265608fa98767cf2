"""A job: a verb that runs without whoever started it. What is true of it lies in its folder.

    JOBS/0007/job.json        what was asked for: argv, cwd, device, created
    JOBS/0007/state.json      what its supervisor knows: processes, started, ended, exit_code
    JOBS/0007/progress.jsonl  the verb's lines of --progress json
    JOBS/0007/log.txt         its words
    JOBS/0007/stop, kill      requests

Times are seconds since 1970. A job whose processes are gone without an exit code is lost: killed, or the
machine went down.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from edge.artefact import json_file, manifest
from edge.errors import EdgeError, InputError

RUNNING = ("waiting", "running", "stopping")
# Between a job's folder and its supervisor's first word.
_STARTS_WITHIN_S = 30
_TAIL = 2**16
# Kept to be reaped: what has ended stays in the process table until its parent asks.
_started: list[subprocess.Popen[bytes]] = []


class Job:
    """The job in `folder`. Raises InputError where there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = read(folder / "job.json")
        if about is None:
            raise InputError(f"{folder} is no job")
        self.argv: list[str] = about["argv"]
        self.cwd, self.device, self.created = about["cwd"], about["device"], about["created"]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def record(self) -> dict[str, Any]:
        return read(self.folder / "state.json") or {}

    @property
    def stops(self) -> int:
        """How often it was asked to stop: 0, 1 or 2."""
        return sum((self.folder / name).exists() for name in ("stop", "kill"))

    @property
    def state(self) -> str:
        """waiting, running, stopping; done, failed, stopped; or lost."""
        record = self.record
        code = record.get("exit_code")
        if code is None:
            supervised = alive(record.get("supervisor"))
            if alive(record.get("verb")) or (supervised and "verb" in record):
                return "stopping" if self.stops else "running"
            if supervised or (not record and time.time() - self.created < _STARTS_WITHIN_S):
                return "waiting"
            # Its supervisor died first: the verb's own last line says how it ended.
            code = self.last_line.get("exit_code")
        if code is None:
            return "lost"
        return "done" if code == 0 else "stopped" if self.stops else "failed"

    @property
    def last_line(self) -> dict[str, Any]:
        """The last whole line of progress; {} before the first."""
        return next(reversed(self.lines(max(0, self._size() - _TAIL))[0]), {})

    def lines(self, start: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The lines of progress from byte `start` on, and the byte behind the last whole one."""
        try:
            with (self.folder / "progress.jsonl").open("rb") as file:
                file.seek(start)
                text = file.read()
        except FileNotFoundError:
            return [], start
        whole = text[: text.rfind(b"\n") + 1]
        return json_file.lines(whole.decode("utf-8", "replace")), start + len(whole)

    def log(self) -> str:
        """The end of what the verb said."""
        with contextlib.suppress(FileNotFoundError), (self.folder / "log.txt").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read().decode("utf-8", "replace")
        return ""

    def stop(self) -> None:
        """Ask it to stop as Ctrl-C does, so that a training writes a checkpoint; the second time, end it."""
        (self.folder / ("kill" if self.stops else "stop")).touch()
        record = self.record
        if not alive(record.get("supervisor")) and alive(record.get("verb")):
            interrupt(record["verb"]["pid"], kill=self.stops == 2)

    def again(self) -> list[str]:
        """The command that runs it once more; a training goes on from its last checkpoint."""
        if self.argv[:2] != ["edge", "train"] or "--plan" in self.argv:
            return self.argv
        return [*(word for word in self.argv if word not in ("--overwrite", "--resume")), "--resume"]

    def delete(self) -> None:
        """Remove its folder. Raises EdgeError while it runs."""
        if self.state in RUNNING:
            raise EdgeError(f"job {self.name} is {self.state}", "stop it first")
        shutil.rmtree(self.folder)

    def _size(self) -> int:
        path = self.folder / "progress.jsonl"
        return path.stat().st_size if path.exists() else 0


def jobs(root: Path) -> list[Job]:
    """All jobs in `root`, in the order of their start."""
    found = []
    for name in sorted(_names(root), key=int):
        with contextlib.suppress(InputError):  # somebody removed a part of it
            found.append(Job(root / name))
    return found


def start(root: Path, argv: list[str], *, device: str = "", cwd: Path | None = None) -> Job:
    """Start a job in `cwd`, or queue it behind the others of its device.

    argv: a command; `edge VERB ...` is this installation's, with --progress json. device: "" waits for none.
    """
    root.mkdir(parents=True, exist_ok=True)
    _started[:] = [one for one in _started if one.poll() is None]
    draft = root / f".{os.getpid()}-{time.time_ns()}"
    draft.mkdir()
    about = {"argv": argv, "cwd": str(Path(cwd or ".").absolute()), "device": device, "created": time.time()}
    json_file.write(draft / "job.json", about)
    number = max(map(int, _names(root)), default=0) + 1
    # A number is there only once those before it are: they are the queue.
    while True:
        folder = root.absolute() / f"{number:04}"
        try:
            draft.rename(folder)
            break
        except OSError:
            if not folder.exists():
                raise
            number += 1
    with (folder / "supervisor.log").open("wb") as log:
        command = [sys.executable, "-m", "edge.jobs.supervisor", str(folder)]
        _started.append(spawn(command, log, log))
    return Job(folder)


def spawn(command: list[str], out: Any, err: Any, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that no signal to this one's terminal or group reaches."""
    if sys.platform == "win32":
        # In a console of its own, which carries CTRL_BREAK to those that it starts.
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
    else:
        options["start_new_session"] = True
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, **options)


def interrupt(pid: int, *, kill: bool) -> None:
    """Send Ctrl-C to the process and its group, or end it with all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if kill:
            for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
                process.kill()
        elif sys.platform == "win32":
            os.kill(pid, signal.CTRL_BREAK_EVENT)
        else:
            os.killpg(pid, signal.SIGINT)


def process(pid: int) -> dict[str, Any]:
    """What tells the process apart from a later one with its number."""
    return {"pid": pid, "began": psutil.Process(pid).create_time()}


def alive(known: dict[str, Any] | None) -> bool:
    """Whether the process that `process` described still runs."""
    return known is not None and manifest.alive(known["pid"], known["began"])


def read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none."""
    try:
        return json_file.read(path, required=True)
    except InputError:
        return None


def _names(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.isdecimal()] if root.is_dir() else []
