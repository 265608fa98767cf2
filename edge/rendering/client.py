"""Asks the process that renders chat templates, and starts another when it has ended."""

from __future__ import annotations

import atexit
import contextlib
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

from edge import child_process
from edge.errors import InputError, RequestError
from edge.rendering.protocol import MEMORY, RENDER_S, frame, read_frame

log = logging.getLogger("edge")

# Seconds until a process that says nothing is ended: it keeps its time itself, but not while it is stopped.
_START_S, _SILENT_S = 60.0, RENDER_S + 4.0


class Renderer:
    """A process that renders chat templates, started when it is first needed. Any thread may ask it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._greeted = self._warned = False

    @property
    def pid(self) -> int | None:
        """The process's id, None while there is none."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process, where it is not running, without waiting until it is ready."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def variables(self, source: str, file: str = "") -> frozenset[str]:
        """The names that the template `source` reads. Raises InputError where it is not valid.

        file: where it stands, for errors.
        """
        return frozenset(self._ask({"source": source}, file)["variables"])

    def literals(self, source: str, file: str = "") -> frozenset[str]:
        """The texts that stand in the template `source`, and the names of the fields that it reads.

        Raises as `variables`.
        """
        return frozenset(self._ask({"source": source}, file)["literals"])

    def render(self, source: str, context: dict[str, Any], file: str = "", *, cut: str = "") -> str:
        """The text that the template `source` makes of `context`, which JSON can say. Raises RequestError.

        cut: a character that is never escaped.
        """
        return str(self._ask({"source": source, "context": context, "cut": cut}, file)["text"])

    def _ask(self, request: dict[str, Any], file: str) -> dict[str, Any]:
        template = "the model's chat template" + (f" ({file})" if file else "")
        try:
            asked = frame(request)
        except (TypeError, ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise RequestError(
                f"{template} is given what JSON cannot say: {why}", param="messages"
            ) from error
        with self._lock:
            try:
                reply = self._exchange(asked)
            except BaseException:
                # What was asked may be answered yet, and must not answer the next.
                self._end()
                raise
        if "invalid" in reply:
            raise InputError(f"{template} is not valid: {reply['invalid']}", "ask with raw: true")
        if "refused" in reply:
            raise RequestError(f"{template} {reply['refused']}", code=reply["code"], param="messages")
        return reply

    def _exchange(self, request: bytes) -> dict[str, Any]:
        # What ended the process may have come from outside, as where a system's memory is short: once more.
        for _ in range(2):
            reply, code, seconds = self._attempt(request)
            if reply is not None:
                return reply
            if seconds >= RENDER_S:
                return {
                    "refused": f"takes more than {RENDER_S:g} s for these messages",
                    "code": "prompt_too_long",
                }
        why = f"ended the process that renders it (exit code {code}), which may have {MEMORY // 2**20} MiB"
        return {"refused": why, "code": "prompt_too_long"}

    def _attempt(self, request: bytes) -> tuple[dict[str, Any] | None, int | None, float]:
        """The reply, or None and the exit code of the process that has ended; the seconds that it took."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        if not self._greeted:
            with _ended_after(_START_S, process):
                hello = read_frame(process.stdout)
            if hello is None:
                raise RequestError(
                    "the process that renders chat templates does not start",
                    status=503,
                    code="renderer_failed",
                    hint="see its messages in the server's log",
                )
            self._greeted = True
            if not hello["limited"] and not self._warned:
                self._warned = True
                log.warning("this system cannot bound the memory of chat templates, only their time")
        began, reply = time.monotonic(), None
        with contextlib.suppress(OSError), _ended_after(_SILENT_S, process):
            process.stdin.write(request)
            process.stdin.flush()
            reply = read_frame(process.stdout)
        seconds = time.monotonic() - began
        if reply is not None:
            return dict(reply), None, seconds
        code = self._end()
        # The next one loads while the client reads its error.
        self._started()
        return None, code, seconds

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = child_process.start("edge.rendering.child", stdout=subprocess.PIPE)
            self._greeted = False
        return self._process

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(OSError), process:
            # Closes both pipes and waits.
            pass
        return process.returncode


@contextlib.contextmanager
def _ended_after(seconds: float, process: subprocess.Popen[bytes]) -> Iterator[None]:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


RENDERER = Renderer()
atexit.register(RENDERER.close)
