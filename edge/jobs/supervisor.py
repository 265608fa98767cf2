"""The process above a job: waits for its turn, runs the verb, passes stops on, keeps the exit code.

It depends on neither a page nor a terminal, and ignores the signals that end those.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edge.artefact import json_file
from edge.jobs.job import RUNNING, Job, interrupt, jobs, process, spawn

_POLL_S = 0.2
_INTERRUPTED = 130


def main(argv: list[str]) -> int:
    """Run the job in the folder argv[0] to its end."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            # Not SIG_IGN: the verb would inherit it, and be deaf to Ctrl-C.
            signal.signal(getattr(signal, name), lambda *_: None)
    job = Job(Path(argv[0]))
    path = job.folder / "state.json"
    state: dict[str, Any] = {"supervisor": process(os.getpid())}
    record(path, state)
    code: int | None = None
    while code is None and waits(job):
        time.sleep(_POLL_S)
        code = _INTERRUPTED if job.stops else None
    if code is None:
        with (job.folder / "progress.jsonl").open("wb") as out, (job.folder / "log.txt").open("wb") as log:
            environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}
            verb = spawn(command(job.argv), out, log, cwd=job.cwd, env=environment)
        record(path, state := {**state, "verb": process(verb.pid), "started": time.time()})
        code = watch(job, verb)
    record(path, {**state, "ended": time.time(), "exit_code": code})
    return 0


def record(path: Path, state: dict[str, Any]) -> None:
    """Write what is known of the job. Where the disk is full it waits for room: nobody else knows the end."""
    while True:
        try:
            json_file.write(path, state)
            return
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            time.sleep(_POLL_S)


def waits(job: Job) -> bool:
    """Whether an earlier job of the same device has not ended."""
    earlier = (one for one in jobs(job.folder.parent) if int(one.name) < int(job.name))
    return bool(job.device) and any(one.device == job.device and one.state in RUNNING for one in earlier)


def watch(job: Job, verb: subprocess.Popen[bytes]) -> int:
    """The verb's exit code, once it has ended, by itself or on request."""
    asked = 0
    while True:
        try:
            return verb.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            if job.stops > asked:
                asked = job.stops
                interrupt(verb.pid, kill=asked == 2)


def command(argv: list[str]) -> list[str]:
    """What runs for `argv`: of `edge VERB ...` this installation's, with progress as JSON lines."""
    if argv[0] != "edge":
        return argv
    return [sys.executable, "-m", "edge.cli", *argv[1:], "--progress", "json"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
