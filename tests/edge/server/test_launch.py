"""The life of the HTTP process: crashes of the engine, signals, a model that cannot be loaded."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from edge.server import launch
from tests.support.fake_server import CHAT, CLIENT, error, fake_server, user
from tests.support.fake_server import launch as launch_command


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_crash_answers_503_and_http_stays_up() -> None:
    with fake_server(reply="z" * 3000, context=4096, step_s=0.02) as server:
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.post, "/generate", {"prompt": "x", "speculate": False})
            body = {"messages": user(), "stream": True, "speculate": False}
            streamed = pool.submit(server.post, CHAT, body)
            server.until(lambda info: info["running"] == 2)
            worker = server.worker()
            os.kill(worker, signal.SIGSEGV)
            assert whole.result().status_code == 503
            assert error(whole.result())["code"] == "engine_crashed"
            rows = [line for line in streamed.result().text.split("\n") if line.startswith("data: ")]
            assert json.loads(rows[-2][6:])["error"]["code"] == "engine_crashed"
            assert rows[-1] == "data: [DONE]"
        assert server.get("/health").status_code == 200
        server.wait()
        assert server.worker() != worker
        assert server.get("/info").json()["restarts"] == 1
        answer = server.post("/generate", {"prompt": "x", "max_tokens": 3})
        assert answer.json()["generate_text"] == "zzz"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("group", [False, True], ids=["server", "group"])
def test_sigterm_drains_and_exits_with_zero(group: bool) -> None:
    """Also where the whole group is told, as by `timeout`, systemd or a container's stop."""
    with fake_server(reply="w" * 3000, context=4096, step_s=0.02, drain=20.0) as server:
        body = {"prompt": "x", "max_tokens": 30, "stream": True, "speculate": False}
        with CLIENT.stream("POST", server.url + "/generate", json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            worker = server.worker()
            if group:
                os.kill(worker, signal.SIGTERM)
            server.process.send_signal(signal.SIGTERM)
            rows = [line[6:] for line in [first, *lines] if line.startswith("data: ")]
        assert rows.pop() == "[DONE]"
        assert "".join(json.loads(row).get("text", "") for row in rows) == "w" * 30
        assert server.process.wait(10) == 0
        assert not psutil.pid_exists(worker)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_while_the_model_is_loaded_ends_the_engine_and_exits_with_zero() -> None:
    command = [sys.executable, "-m", "tests.support.fake_server", "{}"]
    with launch_command(command) as server:
        children = psutil.Process(server.process.pid).children()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0
        assert not psutil.wait_procs(children, timeout=5)[1]


# As a command of ours, which says when it has begun.
COMMAND = """
import importlib, sys
from edge.console import guarded

def run(argv):
    print("begun", flush=True)
    return importlib.import_module("tests.support.fake_server").main()

sys.exit(guarded(run, []))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        pytest.param(line, seconds, marks=[] if (line, seconds) in kept else [pytest.mark.matrix])
        for kept in [{(1, 0.15), (2, 0.05), (2, 0.4)}]
        for line, seconds in [(1, 0.05), (1, 0.15), (1, 0.4), (2, 0.0), (2, 0.05), (2, 0.15), (2, 0.4)]
    ],
)
def test_ctrl_c_at_any_moment_of_the_start_shows_no_traceback(line: int, seconds: float) -> None:
    """In the whole group, as from a terminal: after the command has begun, or its engine process has."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "{}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        for _ in range(line):
            process.stdout.readline()
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert "Traceback" not in said and "Interrupt" not in said
    # Python ends itself by the signal where it came in a text that it executes.
    assert process.returncode == 0 or (
        "stopped by Ctrl-C" in said and process.returncode in (130, -signal.SIGINT)
    )


@pytest.mark.slow
def test_a_template_without_end_is_refused_and_other_requests_go_on() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    models = {"good": {"reply": "z"}, "evil": {"reply": "z", "chat_template": endless}}
    with fake_server(models=models) as server, ThreadPoolExecutor(8) as pool:
        server.post("/generate", {"model": "evil", "prompt": "x", "raw": True})
        began = time.monotonic()
        evil = [pool.submit(server.post, CHAT, {"model": "evil", "messages": user()}) for _ in range(3)]
        time.sleep(0.1)
        assert server.get("/health").status_code == 200
        assert server.post("/generate", {"model": "evil", "prompt": "x", "raw": True}).status_code == 200
        assert time.monotonic() - began < 1.0
        assert server.post(CHAT, {"model": "good", "messages": user()}).status_code == 200
        # Behind one that was at work, and not behind all of them.
        assert time.monotonic() - began < 2.5
        for future in evil:
            assert (future.result().status_code, error(future.result())["code"]) == (400, "prompt_too_long")
            assert "chat template (evil) takes more than 1 s" in error(future.result())["message"]
        anthropic = server.post("/v1/messages", {"model": "evil", "messages": user(), "max_tokens": 1})
        assert anthropic.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_renderer_is_replaced() -> None:
    with fake_server(reply="z") as server:
        renderer = server.child("edge.rendering.child")
        os.kill(renderer, signal.SIGKILL)
        assert server.post(CHAT, {"messages": user()}).status_code == 200
        assert server.child("edge.rendering.child") != renderer


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_stopped_engine_is_not_ready() -> None:
    with fake_server(reply="z") as server:
        assert server.get("/ready").status_code == 200
        worker = server.worker()
        os.kill(worker, signal.SIGSTOP)
        try:
            until = time.monotonic() + 15.0
            while (response := server.get("/ready")).status_code == 200:
                assert time.monotonic() < until
                time.sleep(0.1)
            assert (response.status_code, error(response)["code"]) == (503, "engine_stalled")
            assert "has not answered" in error(response)["message"]
            assert server.get("/health").json()["status"] == "stalled"
        finally:
            os.kill(worker, signal.SIGCONT)
        server.wait()
        assert server.worker() == worker


STREAMS = {
    "/generate": {"prompt": "x"},
    CHAT: {"messages": user()},
    "/v1/completions": {"prompt": ["x", "y"]},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": user()},
    "/api/chat": {"model": "fake", "messages": user()},
    "/api/generate": {"model": "fake", "prompt": "x"},
}
# The last event of each family's stream.
LAST = {
    "/v1/responses": '"type":"error","code":"shutting_down"',
    "/v1/messages": '{"type":"error","error":{"type":"overloaded_error"',
    "/api/chat": '{"error":"the server is shutting down"}',
    "/api/generate": '{"error":"the server is shutting down"}',
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("stopped", [False, True], ids=["engine", "stopped-engine"])
def test_at_the_drains_end_every_stream_ends_with_its_familys_error(stopped: bool) -> None:
    """Also where the engine says nothing more."""
    length = {"max_tokens": 3000, "speculate": False}
    ollama = {"options": {"num_predict": 3000}}
    with (
        fake_server(reply="w" * 5000, context=4096, slots=16, step_s=0.02, drain=1.0) as server,
        ThreadPoolExecutor(16) as pool,
    ):
        streams = {
            path: pool.submit(
                server.post, path, {**(ollama if "/api/" in path else length), **body, "stream": True}
            )
            for path, body in STREAMS.items()
        }
        whole = pool.submit(server.post, CHAT, {**length, **STREAMS[CHAT]})
        server.until(lambda info: info["running"] == len(STREAMS) + 2)
        engine = server.worker()
        if stopped:
            os.kill(engine, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        for path, future in streams.items():
            response = future.result()  # httpx raises where a chunk is torn
            assert response.status_code == 200
            last = response.text.strip().removesuffix("data: [DONE]").strip().rsplit("\n", 1)[1]
            assert LAST.get(path, '"code":"shutting_down"') in last, path
        assert (whole.result().status_code, error(whole.result())["code"]) == (503, "shutting_down")
        assert server.process.wait(15) == 0
        assert not psutil.pid_exists(engine)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_without_file_handles_the_log_stays_short_and_the_server_comes_back(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("w", encoding="utf-8") as written,
        fake_server(log=written, file_handles=64, max_connections=1000) as server,
    ):
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        with contextlib.ExitStack() as held:
            for _ in range(100):
                held.enter_context(socket.create_connection(address, 5.0))
            time.sleep(2.5)
        server.wait()
        assert server.post("/generate", {"prompt": "x", "max_tokens": 2}).status_code == 200
    lines = log.read_text(encoding="utf-8").splitlines()
    assert sum("a connection cannot be accepted" in line for line in lines) == 1
    assert len(lines) < 20 and not any("Traceback" in line for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_engine_and_the_renderer_end_with_the_http_process() -> None:
    with fake_server() as server:
        children = psutil.Process(server.process.pid).children()
        assert len(children) == 2
        server.process.kill()
        assert not psutil.wait_procs(children, timeout=5)[1]


@pytest.mark.slow
def test_a_model_that_cannot_load_ends_the_server_with_its_reason() -> None:
    command = [sys.executable, "-m", "tests.support.fake_server", json.dumps({"slots": "x"})]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 1
    assert "3 times while loading" in done.stderr


@pytest.mark.parametrize("build", ["stock (CPU : AVX2 = 1)", "CPU : AVX2 = 1"])
def test_u31_a_build_from_elsewhere_is_said_at_the_start(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.build_llamacpp, "stock", lambda: "stock: checked")
    ready = SimpleNamespace(
        device="cpu", why="", kind="llamacpp", context=1, slots=1, settings={"build": build}
    )
    model: Any = SimpleNamespace(ready=ready, engine=SimpleNamespace(load_s=0.1))
    lines = launch._ready_line(model).splitlines()
    assert lines[1:] == ([f"{launch.PACKAGE} is stock: checked"] if build.startswith("stock") else [])
