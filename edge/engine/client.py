"""The HTTP process's side of the engine: starts the worker, talks to it, and restarts it when it dies.

A crash in native code ends the worker alone: requests in flight are answered with 503, and the next worker is
started after a pause that grows. A worker that no longer answers is killed, and so replaced. A model is given
up when its worker dies three times while it loads, or at requests without having finished one in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import secrets
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from edge import child_process
from edge.backends.base import BackendInfo
from edge.engine import protocol as msg
from edge.engine.grammar import Constraint
from edge.engine.sampling import Params
from edge.engine.thinking_budget import ReasoningOptions
from edge.engine.worker import Load
from edge.errors import EdgeError, RequestError
from edge.prompt import Prompt

log = logging.getLogger("edge")

_PAUSES_S = (0.5, 2.0, 8.0)
_LOAD_TRIES = 3
_SECRET_BYTES = 16
_CRASHED = "the engine process ended unexpectedly"
# Deaths at requests, none of them finished in between.
_FRUITLESS = 3
# Seconds between two looks for a sign of life; of silence after which an engine is stalled, and is killed.
_BEAT_S, _STALLED_S, _KILLED_S = 1.0, 5.0, 30.0
# Seconds that the engine has to end a request that has run out of its time.
_GRACE_S = 1.0


class Stream:
    """One request's events, as an asynchronous iterator of Delta, ended by one Done.

    Raises RequestError where the request is refused or the engine dies. `cancel` ends it from any task.
    """

    def __init__(self, engine: EngineProcess, key: int) -> None:
        self._engine = engine
        self._key = key
        self._queue: asyncio.Queue[msg.Delta | msg.Done | RequestError] = asyncio.Queue()
        self.deadline: asyncio.TimerHandle | None = None

    def put(self, event: msg.Delta | msg.Done | RequestError) -> None:
        self._queue.put_nowait(event)

    def end(self) -> None:
        """No event follows, or nobody waits for one."""
        if self.deadline is not None:
            self.deadline.cancel()

    def cancel(self) -> None:
        """Stop the work; the iterator ends without a Done."""
        self._engine.cancel(self._key)
        self.put(RequestError("the client has gone", status=499, code="client_closed"))

    async def __aiter__(self) -> AsyncIterator[msg.Delta | msg.Done]:
        try:
            while True:
                event = await self._queue.get()
                if isinstance(event, RequestError):
                    raise event
                yield event
                if isinstance(event, msg.Done):
                    return
        finally:
            self._engine.forget(self._key)


Answer = TypeVar("Answer", msg.Encoded, msg.Embedded)


class Worker:
    """A process that was told what to load. It connects to `listener`, and first sends `secret`.

    process: one that was started before, whose imports have begun; None starts one.
    """

    def __init__(self, load: Load, process: subprocess.Popen[bytes] | None = None) -> None:
        self.secret = secrets.token_bytes(_SECRET_BYTES)
        self.listener = socket.create_server(("127.0.0.1", 0))
        host, port = self.listener.getsockname()
        order = {"host": host, "port": port, "secret": self.secret.hex(), "load": dataclasses.asdict(load)}
        self.process = process or child_process.start(child_process.ENGINE)
        assert self.process.stdin is not None
        # One that is gone already is noticed by its exit code. The pipe stays open while this process lives.
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(order).encode("utf-8") + b"\n")
            self.process.stdin.flush()


class EngineProcess:
    """A supervised worker. `start` returns at once; `wait_ready` when the model is loaded or cannot be.

    begun: the first worker, where it was started before. ready: the loaded model, None while there is none;
    load_s: seconds that loading took. stats: the newest gauges. failure: why the model was given up.
    restarts: workers that had to be replaced. on_done: called for every request that ends.
    """

    def __init__(
        self,
        load: Load,
        on_done: Callable[[msg.Done], None] | None = None,
        begun: Worker | None = None,
    ) -> None:
        self.load = load
        self._on_done = on_done
        self._begun = begun
        self.ready: BackendInfo | None = None
        self.load_s = 0.0
        self.stats: msg.Stats | None = None
        self.failure: EdgeError | None = None
        self.restarts = 0
        self._keys = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._settled = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._broken = ""
        self._fruitless = 0
        self._heard = False
        self._silent_s = 0.0

    @property
    def state(self) -> str:
        """loading, ready, stalled or failed."""
        if self.failure is not None:
            return "failed"
        if self.ready is None:
            return "loading"
        return "stalled" if self._silent_s >= _STALLED_S else "ready"

    @property
    def pid(self) -> int | None:
        """The worker's process id, None between two workers."""
        return self._process.pid if self._process is not None else None

    @property
    def busy(self) -> bool:
        """Whether any request is in flight."""
        return bool(self._streams or self._calls)

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise())

    async def wait_ready(self) -> BackendInfo:
        """The loaded model. Raises EdgeError where the model cannot be loaded."""
        await self._settled.wait()
        if self.failure is not None:
            raise self.failure
        assert self.ready is not None
        return self.ready

    def submit(
        self,
        prompt: str | list[int] | Prompt,
        params: Params,
        *,
        special: bool = True,
        reuse: bool = True,
        timeout_s: float | None = None,
        constraint: Constraint | None = None,
        speculate: bool = True,
        reasoning: ReasoningOptions | None = None,
    ) -> Stream:
        """Start a request. Raises RequestError (503) while no model is loaded."""
        writer = self._connection()
        key = next(self._keys)
        # Packed first: a text that is no text (half a surrogate pair) must leave nothing behind.
        frame = msg.pack(
            msg.Submit(key, prompt, params, special, reuse, timeout_s, constraint, speculate, reasoning)
        )
        stream = self._streams[key] = Stream(self, key)
        if timeout_s is not None:
            # The engine keeps the time itself, unless it is stopped or busy.
            loop = asyncio.get_running_loop()
            stream.deadline = loop.call_later(timeout_s + _GRACE_S, self._expire, key)
        writer.write(frame)
        return stream

    async def encode(self, text: str | Prompt, *, special: bool, whole: bool = False) -> msg.Encoded:
        """Token ids and pieces of `text` (whole: as a prompt). Raises RequestError (503) without a model."""
        return await self._call(msg.Encode(next(self._keys), text, special, whole), msg.Encoded)

    async def decode(self, ids: list[int]) -> msg.Encoded:
        """The pieces of `ids`. Raises RequestError for one outside the vocabulary."""
        return await self._call(msg.Decode(next(self._keys), ids), msg.Encoded)

    async def embed(self, prompt: str | list[int]) -> msg.Embedded:
        """The vector of `prompt`. Raises RequestError where the model gives none, or it does not fit."""
        return await self._call(msg.Embed(next(self._keys), prompt), msg.Embedded)

    async def _call(self, request: msg.Encode | msg.Decode | msg.Embed, answer: type[Answer]) -> Answer:
        writer, frame = self._connection(), msg.pack(request)
        future = self._calls[request.key] = asyncio.get_running_loop().create_future()
        writer.write(frame)
        try:
            event = await future
        except asyncio.CancelledError:
            self._calls.pop(request.key, None)
            self._send(msg.Cancel(request.key))
            raise
        assert isinstance(event, answer)
        return event

    def cancel(self, key: int) -> None:
        if key in self._streams:
            self._send(msg.Cancel(key))

    def forget(self, key: int) -> None:
        """The stream's reader has left; if its request still runs, it is cancelled."""
        if (stream := self._streams.pop(key, None)) is not None:
            stream.end()
            self._send(msg.Cancel(key))

    def _expire(self, key: int) -> None:
        if key in self._streams:
            self._send(msg.Cancel(key))
            error = RequestError(
                "the request ran out of its time", status=408, code="timeout", param="timeout"
            )
            self._end(key, error)

    async def stop(self, seconds: float) -> None:
        """Let running requests end within `seconds`, then end the worker."""
        self._stopping = True
        self._send(msg.Drain(seconds))
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds + 2.0)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _connection(self) -> asyncio.StreamWriter:
        if self.failure is not None:
            raise RequestError(str(self.failure), status=503, code="model_failed")
        if self.ready is None or self._writer is None:
            raise RequestError("the model is being loaded", status=503, code="model_loading", retry_after=1.0)
        self.check_alive()
        return self._writer

    def check_alive(self) -> None:
        """Raise RequestError (503) where the engine's process has not answered for seconds."""
        if self.state == "stalled":
            raise RequestError(
                f"the engine process has not answered for {self._silent_s:.0f} s; it is restarted "
                f"after {_KILLED_S:.0f} s",
                status=503,
                code="engine_stalled",
                retry_after=_STALLED_S,
            )

    def _send(self, request: msg.ToEngine) -> None:
        if self._writer is not None:
            self._writer.write(msg.pack(request))

    async def _supervise(self) -> None:
        load_crashes = crashes = 0
        try:
            while not self._stopping:
                began = time.monotonic()
                code, was_ready = await self._run_once()
                if self._stopping or self.failure is not None:
                    return
                self.restarts += 1
                load_crashes = 0 if was_ready else load_crashes + 1
                # A worker that lived for a while starts the pauses afresh.
                crashes = 1 if was_ready and time.monotonic() - began > 60 else crashes + 1
                log.error("the engine process ended with code %s; starting another", code)
                if load_crashes >= _LOAD_TRIES:
                    self.failure = EdgeError(
                        f"the engine process died {load_crashes} times while loading {self.load.path} "
                        f"(exit code {code})",
                        "see its messages above; `edge doctor` checks the build",
                    )
                    return
                if self._fruitless >= _FRUITLESS:
                    self.failure = EdgeError(
                        f"the engine process died {self._fruitless} times at requests to {self.load.path}, "
                        f"and finished none in between (exit code {code})",
                        "see its messages above; verify the file, or export it again",
                    )
                    return
                await asyncio.sleep(_PAUSES_S[min(crashes, len(_PAUSES_S)) - 1])
        finally:
            self._settled.set()

    async def _run_once(self) -> tuple[int, bool]:
        """One worker's life: (exit code, whether it had loaded)."""
        loop = asyncio.get_running_loop()
        # asyncio's own subprocesses need a certain event loop on Windows; this works on every loop.
        worker, self._begun = self._begun or Worker(self.load), None
        process = self._process = worker.process
        linked: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = loop.create_future()

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, asyncio.TimeoutError, OSError):
                received = await asyncio.wait_for(reader.readexactly(_SECRET_BYTES), 5.0)
                if secrets.compare_digest(received, worker.secret) and not linked.done():
                    linked.set_result((reader, writer))
                    return
            writer.close()

        server = await asyncio.start_server(greet, sock=worker.listener)
        ended = loop.run_in_executor(None, process.wait)
        watch: asyncio.Task[None] | None = None
        try:
            first: set[asyncio.Future[Any]] = {linked, ended}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if linked.done():
                reader, self._writer = linked.result()
                watch = asyncio.create_task(self._watch(process))
                await self._listen(reader)
        finally:
            was_ready = self.ready is not None
            if watch is not None:
                watch.cancel()
            self._lost()
            server.close()
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
            await asyncio.wait([ended], timeout=5.0)
            if not ended.done():
                process.kill()
            code = await ended
            self._process = None
        return code, was_ready

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Ask a loaded worker for signs of life. Turns are counted, not time: this process may have slept."""
        while True:
            self._heard = False
            if self.ready is not None:
                self._send(msg.Ping())
            await asyncio.sleep(_BEAT_S)
            silent = self.ready is not None and not self._heard
            self._silent_s = self._silent_s + _BEAT_S if silent else 0.0
            if self._silent_s >= _KILLED_S:
                self._broken = (
                    f"the engine process did not answer for {self._silent_s:.0f} s; it is restarted"
                )
                log.error("%s", self._broken)
                process.kill()
                return

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readexactly(4)
                body = await reader.readexactly(msg.frame_length(head))
                self._heard = True
                for event in msg.unpack_events(body):
                    self._dispatch(event)

    def _dispatch(self, event: msg.Event) -> None:
        match event:
            case msg.Delta(key):
                if (stream := self._streams.get(key)) is not None:
                    stream.put(event)
            case msg.Done(key):
                if self._on_done is not None:
                    self._on_done(event)
                if event.reason in ("stop", "length"):
                    self._fruitless = 0
                self._end(key, event)
            case msg.Refused(key):
                self._end(key, event.error())
            case msg.Encoded(key) | msg.Embedded(key):
                if isinstance(event, msg.Embedded):
                    self._fruitless = 0
                self._end(key, event)
            case msg.Stats():
                self.stats = event
            case msg.Ready():
                self.ready, self.load_s = event.info, event.load_s
                self._settled.set()
            case msg.Failed(again=True):
                self._broken = f"{event.message}; the engine is restarted"
                log.error("%s", EdgeError(event.message, event.hint))
            case msg.Failed():
                self.failure = EdgeError(event.message, event.hint)
                self._settled.set()

    def _end(self, key: int, outcome: msg.Done | msg.Encoded | msg.Embedded | RequestError) -> None:
        """Hand a request its last event; nobody may be waiting for it any more."""
        if (stream := self._streams.pop(key, None)) is not None:
            assert isinstance(outcome, (msg.Done, RequestError))
            stream.end()
            stream.put(outcome)
        elif (future := self._calls.pop(key, None)) is not None and not future.done():
            if isinstance(outcome, RequestError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _lost(self) -> None:
        """The worker is gone: answer everything that was in flight."""
        if self._writer is not None:
            self._writer.close()
        if self.ready is not None and self.busy and not self._stopping:
            self._fruitless += 1
        self._writer = self.ready = self.stats = None
        self._silent_s = 0.0
        if self.failure is None and not self._stopping:
            self._settled.clear()
        if self._stopping:
            error = RequestError("the server is shutting down", status=503, code="shutting_down")
        else:
            error = RequestError(self._broken or _CRASHED, status=503, code="engine_crashed", retry_after=1.0)
        self._broken = ""
        for key in [*self._streams, *self._calls]:
            self._end(key, error)
