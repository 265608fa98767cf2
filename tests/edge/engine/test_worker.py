"""The engine's process, spoken to over its socket; and what it is told to load."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.backends.fake import FakeBackend
from edge.engine import protocol as msg
from edge.engine.sampling import Params
from edge.engine.worker import Load, open_backend, open_store

SECRET = b"\x01\x02" * 8


class Host:
    """The other end of a worker's socket, as the HTTP process holds it."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process = process
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._events: list[msg.Event] = []

    def send(self, *requests: msg.ToEngine) -> None:
        self._connection.sendall(b"".join(msg.pack(request) for request in requests))

    def next(self, *kinds: type[msg.Event]) -> msg.Event:
        """The next event of one of these kinds."""
        while True:
            while self._events:
                event = self._events.pop(0)
                if isinstance(event, kinds):
                    return event
            head = self._reader.read(4)
            assert head, "the worker closed its socket"
            self._events += msg.unpack_events(self._reader.read(msg.frame_length(head)))

    def hang_up(self, after: bytes = b"") -> None:
        self._connection.sendall(after)
        self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._reader.close()
        self._connection.close()


@contextlib.contextmanager
def worker(load: Load) -> Iterator[Host]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20.0)
        host, port = server.getsockname()
        process = subprocess.Popen([sys.executable, "-m", "edge.engine.worker"], stdin=subprocess.PIPE)
        assert process.stdin is not None
        try:
            order = {"host": host, "port": port, "secret": SECRET.hex(), "load": dataclasses.asdict(load)}
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
            connection, _ = server.accept()
            connection.settimeout(20.0)
            assert connection.recv(len(SECRET), socket.MSG_WAITALL) == SECRET
            with contextlib.closing(Host(process, connection)) as end:
                yield end
        finally:
            process.kill()
            process.wait()
            process.stdin.close()


def test_a_worker_serves_every_kind_of_request_and_drains() -> None:
    load = Load("fake", settings={"reply": "hello", "slots": 2}, why="asked for")
    with worker(load) as host:
        ready = host.next(msg.Ready, msg.Failed)
        assert isinstance(ready, msg.Ready)
        assert (ready.info.kind, ready.info.slots, ready.info.settings) == (
            "fake",
            2,
            {"chosen": "asked for"},
        )
        host.send(
            msg.Submit(1, "x", Params(temperature=0.0)),
            msg.Submit(2, "", Params()),
            msg.Encode(3, "ab", special=False),
            msg.Decode(4, [97]),
            msg.Decode(5, [999]),
            msg.Embed(6, "ab"),
        )
        kinds = (msg.Done, msg.Refused, msg.Encoded, msg.Embedded)
        answers = {}
        while len(answers) < 6:
            event = host.next(*kinds)
            answers[event.key] = event  # type: ignore[union-attr]
        assert isinstance(answers[1], msg.Done) and answers[1].completion_tokens == 6
        assert isinstance(answers[2], msg.Refused) and answers[2].code == "empty_prompt"
        assert answers[3] == msg.Encoded(3, [97, 98], [b"a", b"b"])
        assert answers[4] == msg.Encoded(4, [97], [b"a"])
        assert isinstance(answers[5], msg.Refused) and answers[5].param == "tokens"
        assert isinstance(answers[6], msg.Embedded) and answers[6].tokens == 2
        host.send(msg.Drain(5.0))
        assert host.process.wait(10.0) == 0


def test_a_running_request_can_be_cancelled() -> None:
    load = Load("fake", settings={"reply": "z" * 3000, "context": 4096, "step_s": 0.005})
    with worker(load) as host:
        host.send(msg.Submit(1, "x", Params()))
        host.next(msg.Delta)
        host.send(msg.Cancel(1))
        done = host.next(msg.Done)
        assert isinstance(done, msg.Done)
        assert done.reason == "cancelled" and 0 < done.completion_tokens < 3000


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    with worker(Load("fake")) as host:
        host.next(msg.Ready)
        assert host.process.stdin is not None
        host.process.stdin.close()
        assert host.process.wait(10.0) == 0


@pytest.mark.slow
def test_what_cannot_be_loaded_is_told_with_what_to_do(tmp_path: Path) -> None:
    with worker(Load("llamacpp", path=str(tmp_path / "missing.gguf"))) as host:
        failed = host.next(msg.Ready, msg.Failed)
        assert isinstance(failed, msg.Failed)
        assert "missing.gguf" in failed.message and not failed.again
        assert host.process.wait(10.0) > 0


@pytest.mark.slow
def test_a_step_that_fails_asks_for_another_worker() -> None:
    with worker(Load("fake", settings={"fails_at": 3})) as host:
        host.send(msg.Submit(1, "x", Params(ignore_eos=True)))
        failed = host.next(msg.Failed)
        assert isinstance(failed, msg.Failed) and failed.again
        assert host.process.wait(10.0) > 0


@pytest.mark.parametrize("kept", [0, 3, -1])
def test_half_a_frame_is_no_request_and_ends_the_worker(kept: int) -> None:
    frame = msg.pack(msg.Submit(1, "x", Params()))
    with worker(Load("fake")) as host:
        host.next(msg.Ready)
        host.hang_up(after=frame[:kept])
        assert host.process.wait(10.0) == 0


def test_the_fake_backend_is_opened_as_it_is_set() -> None:
    backend = open_backend(Load("fake", settings={"slots": 3, "context": 99}))
    assert (backend.info.kind, backend.info.slots, backend.info.context) == ("fake", 3, 99)


def test_prefixes_on_disk_are_those_of_one_model_build_and_layout(tmp_path: Path) -> None:
    info = FakeBackend().info
    model, lora = tmp_path / "model.gguf", tmp_path / "lora.gguf"
    for path in (model, lora):
        path.write_bytes(b"x")
    base = Load("llamacpp", path=str(model), store=str(tmp_path / "store"), digest="sha256:1")
    assert open_store(Load("fake"), info) is None

    def seen(writer: Load, reader: Load, **settings: str) -> bool:
        """Whether the store of `reader`, with these settings, has what that of `writer` wrote."""
        tokens = np.arange(100, dtype=np.int32)
        written = open_store(writer, info)
        assert written is not None
        written.save(tokens, b"cells")
        store = open_store(reader, dataclasses.replace(info, settings=settings))
        assert store is not None
        return store.best(tokens) is not None

    assert seen(base, base)
    # How it was tuned is no part of the layout.
    assert seen(base, base, tuned="yes")
    assert not seen(base, base, kv_type="q8_0")
    bare = dataclasses.replace(base, digest="")
    for other in (
        bare,
        dataclasses.replace(base, digest="sha256:2"),
        dataclasses.replace(base, lora=str(lora)),
    ):
        assert not seen(base, other), other
    # Without a digest a file is known by its size and time.
    assert seen(bare, bare)
    key = open_store(bare, info)
    os.utime(model, ns=(1, 1))
    changed = open_store(bare, info)
    assert key is not None and changed is not None and (len(key), len(changed)) == (1, 0)


def test_a_gpu_that_holds_fewer_layers_than_planned_gets_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights find no room with all of two blocks and the output, a context with two, and both with one."""
    from edge.backends import llamacpp
    from tests.support import tiny_llama

    path = tiny_llama.write(tmp_path / "微小.gguf")
    asked: list[int] = []
    real_model, real_context = llamacpp.Model, llamacpp.LlamaCpp

    def model(path: Path, *, gpu_layers: int, extra_buffers: bool) -> llamacpp.Model:
        asked.append(gpu_layers)
        if gpu_layers < 0:
            raise llamacpp.MemoryFullError("the memory is full: weights")
        return real_model(path)

    def context(model: llamacpp.Model, settings: llamacpp.Settings, **options: Any) -> llamacpp.LlamaCpp:
        if settings.gpu_layers > most:
            raise llamacpp.MemoryFullError("the memory is full: context")
        return real_context(model, settings, **options)

    monkeypatch.setattr(llamacpp, "Model", model)
    monkeypatch.setattr(llamacpp, "LlamaCpp", context)
    settings = llamacpp.Settings(
        threads=1, slots=2, context=64, batch=2048, gpu_layers=-1, why="a GPU was found"
    )
    most = 1
    backend = open_backend(Load("llamacpp", str(path), dataclasses.asdict(settings)))
    assert asked == [-1, -1, 2, 1]
    assert (backend.info.settings["gpu_layers"], backend.info.batch) == ("1", 512)
    assert backend.info.why == "a GPU was found; its memory turned out to hold 1 layers"
    backend.close()
    most = 0
    with pytest.raises(llamacpp.MemoryFullError, match="context"):
        open_backend(Load("llamacpp", str(path), dataclasses.asdict(settings)))


def test_a_worker_that_is_told_nothing_ends_quietly() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge.engine.worker"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_server_that_is_gone_is_said_without_a_traceback() -> None:
    """As where Ctrl-C ended it while its engine was still importing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
    order = {"host": host, "port": port, "secret": SECRET.hex(), "load": dataclasses.asdict(Load("fake", ""))}
    done = subprocess.run(
        [sys.executable, "-m", "edge.engine.worker"],
        input=json.dumps(order) + "\n",
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: the server that this engine was started for does not answer: ")
