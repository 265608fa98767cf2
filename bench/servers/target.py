"""A server to be measured: started as a child process, waited for, watched, and always stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from bench.measure.http1 import ProtocolError
from bench.measure.load import Baseline, Dialect, Ours, get
from bench.measure.process_probe import MemoryWatch, tree
from edge.child_process import APART
from edge.console import handling
from edge.errors import EdgeError
from edge.machine.hardware import free_port

_LOG_LINES = 15
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Target:
    """What to start. command: arguments, the port left out as "{port}"; url: a server that runs already.

    ready: a path that answers 200 as soon as requests can be answered; about: one that tells its settings;
    health: one that should always be answered at once. stage: the run's folder whose weights it reads, ""
    where that is not known; dtype: of those weights in memory, for the merged folder. forced: whether it can
    be made to give the number of tokens that was asked for, whatever it would say.
    """

    name: str
    command: list[str]
    dialect: Dialect
    ready: str
    about: str
    environment: dict[str, str] = field(default_factory=dict)
    health: str = "/health"
    stage: str = "gguf"
    dtype: str = ""
    url: str = ""
    forced: bool = True


def _python(module: str, *words: str | Path) -> list[str]:
    """The command of a server that is a Python module."""
    return [sys.executable, "-m", module, *map(str, words), "--port", "{port}"]


def ours(artefact: Path, *options: str) -> Target:
    """edge serving a run folder or a GGUF file."""
    return Target("edge", _python("edge.cli", "serve", artefact, *options), Ours(), "/ready", "/info")


def ours_onnx(folder: Path) -> Target:
    """edge serving a run's ONNX model."""
    return replace(ours(folder, "--backend", "onnx"), name="edge-onnx", stage="onnx")


def baseline(merged: Path, dtype: str) -> Target:
    """The tutorial's server over a transformers folder, in float32 or bfloat16."""
    command = _python("bench.servers.baseline", merged, "--dtype", dtype)
    name = "baseline" if dtype == "float32" else "baseline-bf16"
    return Target(name, command, Baseline(), "/health", "/health", _OFFLINE, stage="merged", dtype=dtype)


def genai(onnx: Path) -> Target:
    """onnxruntime-genai's Generator over the exported folder, behind a queue of the bench's own."""
    command = _python("bench.servers.library_server", "genai", onnx)
    return Target("genai", command, Ours(), "/health", "/health", _OFFLINE, stage="onnx")


def static(merged: Path, dtype: str = "float32") -> Target:
    """transformers with a static cache, behind the same queue."""
    command = _python("bench.servers.library_server", "static", merged, "--dtype", dtype)
    return Target(
        "transformers-static",
        command,
        Ours(),
        "/health",
        "/health",
        _OFFLINE,
        stage="merged",
        dtype=dtype,
    )


@dataclass
class Running:
    """A target that answers. started: on time.perf_counter(); load_s: seconds until it was ready.

    answers_s: seconds until its port first answered, with any status. process: None where it ran before.
    """

    target: Target
    url: str
    process: subprocess.Popen[bytes] | None
    log: Path
    memory: MemoryWatch
    started: float
    load_s: float = 0.0
    answers_s: float = 0.0

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def log_tail(self) -> str:
        if self.process is None:
            return "(it was started elsewhere)"
        return "\n    ".join(last_lines(self.log.read_bytes(), _LOG_LINES))


def last_lines(written: bytes, count: int) -> list[str]:
    """The end of what a program wrote."""
    return written.decode("utf-8", "replace").strip().splitlines()[-count:]


@contextlib.contextmanager
def started(target: Target, log: Path, *, limit: float = 300.0, watch: bool = True) -> Iterator[Running]:
    """The target as a running child in a process group of its own, ready to answer; stopped at the end.

    limit: seconds until it must be ready. watch: sample its memory, which costs a percent of a core or two.
    One that runs already (`url`) is only asked. Raises EdgeError with the end of its log where it ends or is
    late.
    """
    if target.url:
        running = Running(target, target.url, None, log, MemoryWatch(0), time.perf_counter())
        _wait(running, 10.0)
        yield running
        return
    port = free_port()
    command = [word.format(port=port) if word == "{port}" else word for word in target.command]
    log.parent.mkdir(parents=True, exist_ok=True)
    # SIGTERM, whose own action would leave the target running, is as Ctrl-C.
    with handling((signal.SIGTERM,), signal.default_int_handler):
        # A group of its own: Ctrl-C reaches the one who measures, who then stops its targets in order.
        began = time.perf_counter()
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", **target.environment},
                **APART,
            )
        try:
            memory = MemoryWatch(process.pid)
            with memory if watch else contextlib.nullcontext():
                running = Running(target, f"http://127.0.0.1:{port}", process, log, memory, began)
                _wait(running, limit)
                running.load_s = time.perf_counter() - began
                yield running
        finally:
            stop(process)


def _wait(running: Running, limit: float) -> None:
    name, path = running.target.name, running.target.ready
    while True:
        if running.process is not None and running.process.poll() is not None:
            code = running.process.returncode
            raise EdgeError(
                f"the server '{name}' ended with code {code} before it was ready",
                f"its last words:\n    {running.log_tail()}",
            )
        with contextlib.suppress(OSError, TimeoutError, ProtocolError):
            status, _ = asyncio.run(get(running.url, path, limit=5.0, key=running.target.dialect.key))
            running.answers_s = running.answers_s or time.perf_counter() - running.started
            if status == 200:
                return
        if time.perf_counter() - running.started > limit:
            raise EdgeError(
                f"the server '{name}' was not ready after {limit:g} s",
                f"its last words:\n    {running.log_tail()}",
            )
        time.sleep(0.1)


def stop(process: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """End the process and every descendant: asked first, killed after `grace` seconds. Safe to repeat."""
    # Taken first: once the parent has gone, its children can no longer be found through it.
    family = tree(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    if sys.platform != "win32":
        # Children that were born since, or whose parent had died before us.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=grace)
