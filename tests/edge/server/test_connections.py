"""Bounds on what a client may send before a route sees it: raw sockets against uvicorn with our protocol."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from edge.server import connections
from edge.server.cli import bind
from edge.server.launch import Server, config

GET = b"GET /x HTTP/1.1\r\nHost: a\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the size of the body and the names of the headers; /slow takes half a second."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(0.5)
    names = [name.decode() for name, _ in scope["headers"]]
    body = json.dumps({"size": size, "headers": names}).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def served(limit: int = 16) -> AsyncIterator[int]:
    """The port of a server over `app`."""
    server = Server(config(app, 1.0, limit))
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        try:
            yield port
        finally:
            server.should_exit = True
            await task


async def talk(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """All that the server says to `parts`, until it closes the connection; writing may fail by then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def write() -> None:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)

    writing = asyncio.create_task(write())
    received = b""
    try:
        with contextlib.suppress(ConnectionError):
            while piece := await asyncio.wait_for(reader.read(65536), 5.0):
                received += piece
    finally:
        writing.cancel()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return received


def run(work: Callable[[int], Coroutine[Any, Any, None]], limit: int = 16) -> None:
    async def whole() -> None:
        async with served(limit) as port:
            await work(port)

    asyncio.run(asyncio.wait_for(whole(), 30.0))


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def code(answer: bytes) -> str:
    text: str = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"]
    return text


LARGE = {
    "many small headers": [GET, *[b"a: b\r\n" * 1000] * 60],
    "one long header": [GET + b"a: ", *[b"x" * 10_000] * 40],
    "one long header in one piece, unfinished": [GET + b"a: " + b"x" * 70_000],
    "one long header in one piece": [GET + b"a: " + b"x" * 70_000 + b"\r\n\r\n"],
    "a header's long name": [GET, *[b"x" * 10_000] * 40],
    "trailers": [
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n",
        *[b"a: b\r\n" * 1000] * 60,
    ],
    "a chunk's extension": [
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        *[b"x" * 10_000] * 40,
    ],
}


def test_headers_have_a_size() -> None:
    async def work(port: int) -> None:
        for name, parts in LARGE.items():
            answer = await talk(port, *parts, pause=0.001)
            assert (status(answer), code(answer)) == (431, "headers_too_large"), name

    run(work)


def test_a_url_has_a_size() -> None:
    async def work(port: int) -> None:
        url = b"GET /" + b"x" * 70_000
        for parts in ([url], [url, b" HTTP/1.1\r\nHost: a\r\n\r\n"], [b"GET /", *[b"x" * 10_000] * 40]):
            answer = await talk(port, *parts, pause=0.001)
            assert (status(answer), code(answer)) == (414, "uri_too_long")

    run(work)


def test_what_is_within_the_bounds_is_answered() -> None:
    async def work(port: int) -> None:
        close = b"Connection: close\r\n\r\n"
        many = await talk(port, GET, b"a: b\r\n" * 5000, close)
        assert json.loads(many.split(b"\r\n\r\n", 1)[1])["headers"].count("a") == 5000
        long = b"GET /?" + b"x" * 60_000 + b" HTTP/1.1\r\nHost: a\r\n"
        assert status(await talk(port, long + close)) == 200
        # The head of a request may stand behind the long body of the one before.
        post = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n" + b"y" * 200_000
        both = await talk(port, post + GET[:9], GET[9:] + close, pause=0.05)
        assert both.count(b"HTTP/1.1 200") == 2 and b'"size": 200000' in both
        # A trailer is dropped: it is no header of the request.
        chunked = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
        trailed = await talk(port, chunked + close, b"1\r\na\r\n", b"0\r\nx-late: 1\r\n\r\n", pause=0.05)
        assert status(trailed) == 200 and b"x-late" not in trailed
        assert (status(bad := await talk(port, b"nonsense\r\n\r\n")), code(bad)) == (400, "invalid_http")

    run(work)


@pytest.mark.slow
def test_requests_that_wait_behind_another_are_few() -> None:
    """uvicorn keeps 1.4 KiB for each, and reads on while it answers."""

    async def ask(count: int) -> int:
        async with served() as port:
            first = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
            last = GET + b"Connection: close\r\n\r\n"
            return (await talk(port, first + (GET + b"\r\n") * count + last)).count(b"HTTP/1.1 200")

    assert asyncio.run(ask(connections.PIPELINED - 2)) == connections.PIPELINED
    assert asyncio.run(ask(5000)) < connections.PIPELINED


@pytest.mark.timing
def test_headers_and_bodies_have_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    monkeypatch.setattr(connections, "BODY_S", 0.6)

    async def work(port: int) -> None:
        loop = asyncio.get_running_loop()
        post = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab"
        first = GET + b"\r\n"
        cases: list[tuple[list[bytes], float, list[int]]] = [
            ([], 0.3, []),
            ([GET], 0.3, [408]),
            ([GET, *[b"a: b\r\n"] * 50], 0.3, [408]),  # a trickle proves nothing
            ([b"\r\n"] * 50, 0.3, []),
            ([post], 0.6, [408]),
            ([post.replace(b"9", b"99"), *[b"c"] * 50], 0.6, [408]),
            ([first, GET], 0.3, [200, 408]),
            ([first, b"\r\n"], 0.3, [200]),
        ]
        for parts, seconds, expected in cases:
            began = loop.time()
            answer = await talk(port, *parts, pause=0.05)
            statuses = [int(row[:3]) for row in answer.split(b"HTTP/1.1 ")[1:]]
            assert statuses == expected, parts
            assert seconds - 0.1 < loop.time() - began < seconds + 1.0, parts
        # Half-open connections do not stay, and the ones that do come in time are answered.
        halves = [asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
        opened = await asyncio.gather(*halves)
        for _, writer in opened:
            writer.write(GET)
        await asyncio.sleep(1.0)
        assert status(await talk(port, GET + b"Connection: close\r\n\r\n")) == 200
        for reader, writer in opened:
            assert status(await asyncio.wait_for(reader.read(), 5.0)) == 408
            writer.close()

    run(work)


@pytest.mark.slow
def test_a_late_second_request_leaves_the_answer_to_the_first_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.1)

    async def work(port: int) -> None:
        slow = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
        seconds = (GET, GET + b"a: " + b"x" * 70_000, b"nonsense\r\n\r\n")
        for answer in await asyncio.gather(*(talk(port, slow + second) for second in seconds)):
            assert answer.count(b"HTTP/1.1 ") == 1 and answer.endswith(b'["host"]}')

    run(work)


@pytest.mark.slow
def test_connections_above_the_limit_are_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "rare", connections.RareLog())

    async def work(port: int) -> None:
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        for _ in range(5):
            answer = await talk(port, GET + b"\r\n")
            assert (status(answer), code(answer)) == (503, "too_many_connections")
            assert b"retry-after: 1\r\n" in answer
        for _, writer in opened:
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.1)
        assert status(await talk(port, GET + b"Connection: close\r\n\r\n")) == 200

    with caplog.at_level(logging.WARNING, "edge.http"):
        run(work, limit=3)
    assert [record.message for record in caplog.records] == [
        "a connection is refused: 3 are open (--max-connections)"
    ]


def test_no_file_handles_are_one_line_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(connections.time, "monotonic", lambda: now)
    monkeypatch.setattr(connections, "rare", connections.RareLog())
    context = {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")}

    async def work() -> None:
        nonlocal now
        loop = asyncio.get_running_loop()
        for _ in range(1000):
            connections.loop_error(loop, context)
        now += 61.0
        connections.loop_error(loop, context)
        connections.loop_error(loop, {"message": "something else", "exception": ValueError("x")})

    with caplog.at_level(logging.WARNING):
        asyncio.run(work())
    first, second, other = [record.message for record in caplog.records]
    assert first.startswith("a connection cannot be accepted: Too many open files")
    assert second == f"{first} (and 999 times before)"
    assert other.startswith("something else")


def test_the_default_limit_leaves_file_handles_over(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    for handles, limit in ((256, 192), (1024, 768), (2**20, 1024), (resource.RLIM_INFINITY, 1024), (8, 16)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, handles=handles: (handles, handles))
        assert connections.default_limit() == limit
