"""The load generator against a server whose delays are known."""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.measure import metrics
from bench.measure.http1 import Events, ProtocolError, Response, request
from bench.measure.load import Baseline, HealthProbe, Ours, ask, closed_loop, get
from bench.measure.metrics import Sample
from bench.measure.workloads import Job
from tests.support.mock_server import Mock, serving

ROOT = Path(__file__).parents[3]


def drive(mock: Any, *, clients: int = 1, requests: int = 1, tokens: int = 20) -> list[Sample]:
    async def run() -> list[Sample]:
        async with serving(mock) as url:
            jobs = [Job("你好", n, tokens) for n in range(requests)]
            return await closed_loop(url, Ours(), jobs, clients, limit=20.0)

    return asyncio.run(run())


@pytest.mark.timing
def test_recovers_the_known_delays() -> None:
    # What else runs on the machine delays the mock too, so its own stamps are what is known; and it delays
    # the reader, so that of several tries one must be right for each figure.
    wrong: list[tuple[float, float, float]] = []
    for _ in range(8):
        mock = Mock(1.0, 0.02)  # a hundredth of the first delay is what waking up takes on a busy machine
        samples = drive(mock, clients=4, requests=4)
        assert [s.state for s in samples] == ["ok"] * 4
        asked = [Sample(0, 0, 0, came, events=[(at, 1) for at in sent]) for came, sent in mock.made]
        assert all(metrics.ttft(s) >= 1.0 for s in asked)
        found, known = (
            [
                min(figure(s) or 9.0 for s in side)
                for figure in (lambda s: metrics.median(metrics.itl(s)), metrics.ttft, metrics.tpot)
            ]
            for side in (samples, asked)
        )
        wrong.append(tuple(one / right - 1 for one, right in zip(found, known, strict=True)))
        if all(min(map(abs, tries)) < 0.02 for tries in zip(*wrong, strict=True)):
            return
    pytest.fail(f"(ITL, TTFT, TPOT) were measured wrong by {wrong}")


def test_asks_for_a_fixed_number_of_greedy_tokens_and_keeps_what_the_server_counted() -> None:
    mock = Mock(0.0, 0.0)
    [s] = drive(mock)
    assert mock.bodies[0]["prompt"] == "你好" and mock.bodies[0]["raw"] is True
    assert mock.bodies[0]["max_tokens"] == 20 and mock.bodies[0]["ignore_eos"] is True
    assert mock.bodies[0]["temperature"] == 0.0 and mock.bodies[0]["cache_prompt"] is False
    assert (s.prompt_tokens, s.completion_tokens, s.finish) == (7, 20, "length")
    assert s.text == "la " * 20


@pytest.mark.timing
def test_clients_are_a_closed_loop() -> None:
    samples = drive(Mock(0.05, 0.0), clients=2, requests=6, tokens=3)
    assert sorted(s.prompt for s in samples) == list(range(6))
    assert {s.client for s in samples} == {0, 1}
    for moment in (s.start for s in samples):
        assert sum(s.start <= moment < s.end for s in samples) <= 2


def test_an_early_end_is_incomplete() -> None:
    [s] = drive(Mock(0.0, 0.0, cut=5, fault="stop"))
    assert (s.state, s.completion_tokens, s.finish) == ("incomplete", 5, "stop")


@pytest.mark.parametrize(
    ("mock", "says"),
    [
        (Mock(0.0, 0.0, cut=5, fault="drop"), "middle of the answer"),
        (Mock(0.0, 0.0, cut=5, fault="error"), "the engine has gone"),
        (Mock(0.0, 0.0, status=503), "HTTP 503: sorry"),
    ],
)
def test_failures_are_errors_that_say_why(mock: Mock, says: str) -> None:
    [s] = drive(mock)
    assert s.state == "error" and says in s.error


def test_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        s = asyncio.run(ask(url, Ours(), Job("x", 0, 3)))
    assert s.state == "error" and "ConnectionRefused" in s.error


def test_a_server_that_never_answers_runs_out_of_time() -> None:
    async def run() -> Sample:
        async with serving(Mock(30.0, 0.0)) as url:
            return await ask(url, Ours(), Job("x", 0, 3), limit=0.1)

    s = asyncio.run(run())
    assert s.error == "no whole answer within 0.1 s"


def test_the_baseline_answers_in_one_piece() -> None:
    said = json.dumps(
        {"generate_text": "你好", "usage": {"prompt_tokens": 2, "completion_tokens": 4}}
    ).encode()
    asked = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1])
        await asyncio.sleep(0.1)
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(said)}\r\n\r\n".encode() + said)
        writer.close()

    async def run() -> Sample:
        async with serving(answer) as url:
            return await ask(url, Baseline(), Job("你 好&", 0, 4))

    s = asyncio.run(run())
    assert asked == [b"/generate?prompt=%E4%BD%A0+%E5%A5%BD%26&max_new_tokens=4"]
    assert (s.state, s.text, metrics.itl(s)) == ("ok", "你好", [])
    assert metrics.ttft(s) == pytest.approx(metrics.e2e(s), rel=0.05)
    assert metrics.e2e(s) >= 0.1


@pytest.mark.timing
@pytest.mark.parametrize("most", [100, 2])
def test_the_health_probe_sees_a_blocked_server(most: int) -> None:
    connected = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1
        await reader.readuntil(b"\r\n\r\n")
        await gate.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def run() -> HealthProbe:
        async with serving(answer) as url, HealthProbe(url, interval=0.05, most=most) as probe:
            await asyncio.sleep(0.4)
            blocked.append(connected)
            gate.set()
        return probe

    gate = asyncio.Event()
    blocked: list[int] = []
    probe = asyncio.run(run())
    assert blocked[0] <= most
    # It went on asking while it waited: the later questions waited less.
    assert probe.failures == 0 and len(probe.seconds) >= 5
    assert max(probe.seconds) >= 0.35 and min(probe.seconds) < 0.2


def test_get() -> None:
    async def run() -> tuple[int, bytes]:
        async with serving(Mock(0.0, 0.0)) as url:
            return await get(url, "/health")

    assert asyncio.run(run()) == (200, b"{}")


BODY = 'data: {"text": "你好👩‍🚀"}\n\ndata: [DONE]\n\n'.encode()
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
    + b"".join(b"%x;x=1\r\n%b\r\n" % (len(p), p) for p in (BODY[:19], BODY[19:20], BODY[20:]))
    + b"0\r\ntrailer: 1\r\n\r\n"
)


@given(st.lists(st.integers(0, len(CHUNKED)), max_size=12))
def test_however_the_bytes_are_cut(cuts: list[int]) -> None:
    response, events = Response(), Events()
    bounds = [0, *sorted(cuts), len(CHUNKED)]
    found = [
        event for a, b in itertools.pairwise(bounds) for event in events.feed(response.feed(CHUNKED[a:b]))
    ]
    assert response.done and response.status == 200
    assert found == ['{"text": "你好👩‍🚀"}', "[DONE]"]


def test_bodies_without_chunks() -> None:
    sized = Response()
    assert sized.feed(b"HTTP/1.1 201 Made\r\nContent-Length: 3\r\n\r\nabcd") == b"abc"
    assert sized.done and sized.status == 201
    unsized = Response()
    assert unsized.feed(b"HTTP/1.0 200 OK\r\n\r\nabc") == b"abc"
    assert not unsized.done
    unsized.eof()
    assert unsized.done


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"]
)
def test_what_is_not_http(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Response().feed(data)


def test_request_bytes() -> None:
    head, _, body = request("POST", "h:1", "/x", {"a": "é"}).partition(b"\r\n\r\n")
    assert b"content-length: 11" in head and json.loads(body) == {"a": "é"}


@pytest.mark.timing
@pytest.mark.slow
def test_sixty_four_streams_of_fifty_tokens_a_second_on_one_core() -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.mock_server", "2.0", "0.02"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        jobs = [Job("x", n, 250) for n in range(64)]
        before = resource.getrusage(resource.RUSAGE_SELF)
        samples = asyncio.run(closed_loop(url, Ours(), jobs, 64))
        after = resource.getrusage(resource.RUSAGE_SELF)
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
    assert [s.state for s in samples] == ["ok"] * 64
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.8 * metrics.wall(samples), "the generator would be the bottleneck"
    assert metrics.median([metrics.tpot(s) or 0 for s in samples]) == pytest.approx(0.02, rel=0.02)
    assert metrics.median([metrics.ttft(s) or 0 for s in samples]) == pytest.approx(2.0, rel=0.1)
    sys.stderr.write(f"{used:.2f} s of processor in {metrics.wall(samples):.2f} s\n")
