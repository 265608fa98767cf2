"""Answers that are made while the client listens, and stop being made when it has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge.errors import RequestError

GONE = 499
# Where the outermost middleware leaves the server's own `send`: chunks of a stream need no wrapper around it.
SEND = "edge.send"
_Headers = list[tuple[bytes, bytes]]

# Compact UTF-8 JSON.
dump: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def event(value: Any) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class Cancels(Protocol):
    """Work that can be stopped from outside."""

    def cancel(self) -> None: ...


class _Live(Response):
    """Watches the connection while `_produce` works; a client that goes away cancels its streams."""

    def __init__(self, streams: Sequence[Cancels], headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await self._produce(send, scope.get(SEND, send))
        except BaseException as error:
            for stream in self._streams:
                stream.cancel()
            if not isinstance(error, RequestError) or error.status != GONE:
                raise
        finally:
            watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for stream in self._streams:
            stream.cancel()

    async def _produce(self, send: Send, send_body: Send) -> None:
        raise NotImplementedError

    def _head(self, content_type: bytes, extra: _Headers) -> dict[str, Any]:
        kept = [(k, v) for k, v in self.raw_headers if k not in (b"content-length", b"content-type")]
        headers = [*kept, (b"content-type", content_type), *extra]
        return {"type": "http.response.start", "status": 200, "headers": headers}


class Answer(_Live):
    """A JSON answer, sent when `make` has read the streams."""

    def __init__(
        self, streams: Sequence[Cancels], make: Callable[[], Awaitable[Any]], headers: dict[str, str]
    ) -> None:
        super().__init__(streams, headers)
        self._make = make

    async def _produce(self, send: Send, send_body: Send) -> None:
        body = dump(await self._make())
        length = (b"content-length", str(len(body)).encode())
        await send(self._head(b"application/json", [length]))
        await send_body({"type": "http.response.body", "body": body})


class EventStream(_Live):
    """Server-sent events. An error before the first is an HTTP error, a later one an event."""

    content_type = b"text/event-stream; charset=utf-8"

    def __init__(
        self, streams: Sequence[Cancels], chunks: AsyncIterator[bytes], headers: dict[str, str]
    ) -> None:
        super().__init__(streams, headers)
        self._chunks = chunks

    def _failed(self, error: RequestError) -> bytes:
        """How a stream that has begun says that it has failed."""
        return event(error.body()) + DONE

    async def _produce(self, send: Send, send_body: Send) -> None:
        chunks = self._chunks
        chunk = await anext(chunks)
        quiet: _Headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await send(self._head(self.content_type, quiet))
        await send_body({"type": "http.response.body", "body": chunk, "more_body": True})
        try:
            async for chunk in chunks:
                await send_body({"type": "http.response.body", "body": chunk, "more_body": True})
        except RequestError as error:
            if error.status == GONE:
                raise
            await send_body({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        await send_body({"type": "http.response.body", "body": b""})
