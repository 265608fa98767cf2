"""Many requests at once, and clients that leave."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from edge.server.streaming import start_streams
from tests.support.fake_server import CHAT, CLIENT, Server, error, events, fake_server, user


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    """Never stops by itself within its context; 20 ms a step."""
    with fake_server(
        reply="x" * 5000, context=4096, slots=2, step_s=0.02, token_s=0.001, max_queue=3
    ) as server:
        yield server


@pytest.mark.slow
def test_s4_parallel_requests_are_isolated() -> None:
    with fake_server(slots=4, context=256) as server:

        def ask(k: int) -> str:
            body = {"prompt": f"repeat the number {k}", "raw": True, "max_tokens": 30, "ignore_eos": True}
            text: str = server.post("/generate", body).json()["generate_text"]
            return text

        alone = [ask(k) for k in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(8))) == alone
        assert len(set(alone)) == 8


@contextlib.contextmanager
def running(server: Server, count: int) -> Iterator[None]:
    """`count` endless streams that have given their first token; they end with the block."""
    with contextlib.ExitStack() as held:
        streams = []
        for _ in range(count):
            body = {"prompt": "x", "stream": True, "speculate": False}
            response = held.enter_context(CLIENT.stream("POST", server.url + "/generate", json=body))
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            streams.append(lines)  # an iterator that is dropped closes its response
        yield


@pytest.mark.timing
def test_health_answers_while_tokens_are_made(slow: Server) -> None:
    with running(slow, 2), httpx.Client(base_url=slow.url) as client:
        client.get("/health")
        waits = []
        for _ in range(20):
            began = time.perf_counter()
            assert client.get("/health").json()["status"] == "ready"
            waits.append(time.perf_counter() - began)
        slow.until(lambda info: info["running"] == 2)
    assert sorted(waits)[10] < 0.05


@pytest.mark.timing
@pytest.mark.slow
def test_s3_a_client_that_goes_frees_its_slot_in_every_phase(slow: Server) -> None:
    long = {"prompt": "p" * 1500, "raw": True, "cache_prompt": False}
    cases = {
        "before the first token": ({**long, "stream": True}, 0),
        "after three": ({"prompt": "x", "stream": True}, 3),
        "in an unstreamed request": ({"prompt": "x"}, 0),
    }
    for phase, (body, wanted) in cases.items():
        with socket.create_connection(("127.0.0.1", int(slow.url.rsplit(":", 1)[1]))) as client:
            text = json.dumps(body)
            head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
            slow.until(lambda info: info["busy_slots"] == 1)
            received = b""
            while received.count(b'"text"') < wanted:
                received += client.recv(4096)
        began = time.monotonic()
        slow.until(lambda info: info["busy_slots"] == 0, seconds=1.5)
        assert time.monotonic() - began < 1.0, phase


@pytest.mark.slow
def test_a_full_queue_answers_429_with_retry_after(slow: Server) -> None:
    body = {"prompt": "x", "max_tokens": 3}
    with ThreadPoolExecutor(3) as pool:
        with running(slow, 2):
            queued = [pool.submit(slow.post, "/generate", body) for _ in range(3)]
            slow.until(lambda info: info["waiting"] == 3)
            refused = slow.post("/generate", body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert error(refused)["type"] == "rate_limit_error"
        assert [future.result().status_code for future in queued] == [200] * 3


@pytest.mark.slow
def test_a_deadline_answers_408(slow: Server) -> None:
    response = slow.post("/generate", {"prompt": "x", "timeout": 0.2})
    assert (response.status_code, error(response)["code"]) == (408, "timeout")
    # A stream that has begun can only say it in its last event.
    streamed = slow.post(CHAT, {"messages": user("x"), "timeout": 0.5, "stream": True})
    assert streamed.status_code == 200
    assert events(streamed)[-1]["error"]["code"] == "timeout"
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_streams_that_were_started_are_cancelled_when_one_cannot_start() -> None:
    class Started:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    started: list[Any] = []

    def starting() -> Iterator[Any]:
        for _ in range(3):
            started.append(Started())
            yield started[-1]
        raise OverflowError("the fourth")

    with pytest.raises(OverflowError):
        start_streams(starting())
    assert [stream.cancelled for stream in started] == [True] * 3
