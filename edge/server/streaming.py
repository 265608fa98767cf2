"""Responses that are generated while the client listens, and stop being generated when it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge.engine.client import Stream
from edge.errors import RequestError
from edge.server import error_body
from edge.server.served_model import GONE, shutting_down

# Where the outermost middleware leaves the server's own `send`: chunks of a stream need no wrapper around it.
SEND = "edge.send"
DONE = b"data: [DONE]\n\n"
# For a route's `responses`: its answer may be a stream of server-sent events.
SSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

# Compact UTF-8 JSON.
dump: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def event(value: Any) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """`value` as one server-sent event whose name is its `type`."""
    return f"event: {value['type']}\n".encode("ascii") + event(value)


def openai_failure(error: RequestError) -> bytes:
    """The end of an OpenAI stream that failed after it had begun."""
    return event(error_body.openai(error)) + DONE


def start_streams(streams: Iterable[Stream]) -> list[Stream]:
    """Every stream of `streams`, which starts them as it is read; where one cannot start, none goes on."""
    started: list[Stream] = []
    try:
        for stream in streams:
            started.append(stream)
    except BaseException:
        for stream in started:
            stream.cancel()
        raise
    return started


def respond(
    streams: Sequence[Stream],
    headers: dict[str, str],
    *,
    answer: Callable[[], Awaitable[Any]],
    events: AsyncIterator[bytes] | None,
    **options: Any,
) -> Response:
    """The response that reads `streams`: events where a stream was asked for, else the JSON of `answer`.

    options: keywords of `EventStream`.
    """
    if events is None:
        return JsonAnswer(streams, headers, answer)
    return EventStream(streams, headers, events, **options)


class _LiveResponse(Response):
    """Watches the connection while `produce` works; a client that leaves cancels its streams."""

    def __init__(self, streams: Sequence[Stream], headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await self.produce(send, scope.get(SEND, send))
        except BaseException as error:
            self._cancel()
            if not isinstance(error, RequestError) or error.status != GONE:
                raise
        finally:
            watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._cancel()

    def _cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()

    async def produce(self, send: Send, send_body: Send) -> None:
        raise NotImplementedError

    def head(self, **extra: str) -> dict[str, Any]:
        """The message that starts the response. extra: headers, with underscores for dashes."""
        kept = [(k, v) for k, v in self.raw_headers if k not in (b"content-length", b"content-type")]
        rows = [(name.replace("_", "-").encode(), value.encode()) for name, value in extra.items()]
        return {"type": "http.response.start", "status": 200, "headers": [*kept, *rows]}


class JsonAnswer(_LiveResponse):
    """A JSON answer, sent when `answer` has read the streams."""

    def __init__(
        self, streams: Sequence[Stream], headers: dict[str, str], answer: Callable[[], Awaitable[Any]]
    ) -> None:
        super().__init__(streams, headers)
        self._answer = answer

    async def produce(self, send: Send, send_body: Send) -> None:
        body = dump(await self._answer())
        await send(self.head(content_type="application/json", content_length=str(len(body))))
        await send_body({"type": "http.response.body", "body": body})


class EventStream(_LiveResponse):
    """Events as they come, server-sent by default. An error before the first is an HTTP error.

    failure: the last event of a stream that fails later.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        headers: dict[str, str],
        events: AsyncIterator[bytes],
        *,
        failure: Callable[[RequestError], bytes] = openai_failure,
        content_type: str = "text/event-stream; charset=utf-8",
    ) -> None:
        super().__init__(streams, headers)
        self._events = events
        self._failure = failure
        self._content_type = content_type

    async def produce(self, send: Send, send_body: Send) -> None:
        chunk = await anext(self._events)
        headers = {"cache_control": "no-cache", "x_accel_buffering": "no"}
        await send(self.head(content_type=self._content_type, **headers))
        await send_body({"type": "http.response.body", "body": chunk, "more_body": True})
        try:
            async for chunk in self._events:
                await send_body({"type": "http.response.body", "body": chunk, "more_body": True})
        except (RequestError, asyncio.CancelledError) as error:
            # Cancelled: the time to drain is over, and the client must not take a torn stream for a whole.
            self._cancel()
            failure = error if isinstance(error, RequestError) else shutting_down()
            if failure.status == GONE:
                raise
            chunk = self._failure(failure)
            await send_body({"type": "http.response.body", "body": chunk, "more_body": True})
        await send_body({"type": "http.response.body", "body": b""})
