"""Answers that are made while the client listens, and stop being made when it has gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge.errors import RequestError
from edge.supervisor import Stream

log = logging.getLogger("edge")

_GONE = 499
_Headers = list[tuple[bytes, bytes]]


def dump(value: Any) -> bytes:
    """`value` as compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def event(value: Any) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class _Live(Response):
    """Watches the connection while `_produce` works; a client that goes away cancels its stream."""

    def __init__(self, stream: Stream, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await self._produce(send)
        except RequestError as error:
            if error.status != _GONE:
                raise
        finally:
            watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._stream.cancel()

    async def _produce(self, send: Send) -> None:
        raise NotImplementedError

    def _head(self, content_type: bytes, extra: _Headers) -> dict[str, Any]:
        kept = [(k, v) for k, v in self.raw_headers if k not in (b"content-length", b"content-type")]
        headers = [*kept, (b"content-type", content_type), *extra]
        return {"type": "http.response.start", "status": 200, "headers": headers}


class Answer(_Live):
    """A JSON answer, sent when `make` has read the whole stream."""

    def __init__(
        self, stream: Stream, make: Callable[[Stream], Awaitable[Any]], headers: dict[str, str]
    ) -> None:
        super().__init__(stream, headers)
        self._make = make

    async def _produce(self, send: Send) -> None:
        body = dump(await self._make(self._stream))
        length = (b"content-length", str(len(body)).encode())
        await send(self._head(b"application/json", [length]))
        await send({"type": "http.response.body", "body": body})


class EventStream(_Live):
    """Server-sent events. An error before the first event is an HTTP error, later one an event of its own."""

    def __init__(
        self, stream: Stream, make: Callable[[Stream], AsyncIterator[bytes]], headers: dict[str, str]
    ) -> None:
        super().__init__(stream, headers)
        self._make = make

    async def _produce(self, send: Send) -> None:
        chunks = self._make(self._stream)
        chunk = await anext(chunks)
        quiet: _Headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await send(self._head(b"text/event-stream; charset=utf-8", quiet))
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        try:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except RequestError as error:
            if error.status == _GONE:
                raise
            tail = event(error.body()) + DONE
            await send({"type": "http.response.body", "body": tail, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
