"""Connections: uvicorn's HTTP protocol with bounds on what a client may send before any route sees it.

A header block has a size and a time, a body has a time, and so many connections are open at once at most.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import sys
import time
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from edge.errors import RequestError
from edge.server import error_body

log = logging.getLogger("edge.http")

# Bytes of a request line and its headers, and of what stands around a body (trailers, chunk extensions).
MAX_HEAD = 64 * 1024
# Requests that may wait behind one that is being answered: uvicorn reads on for as long as answers are sent.
PIPELINED = 64
HEAD_S = 10.0
BODY_S = 60.0
# A refused client may still be sending: its input is dropped for so long, that it can read the answer.
LINGER_S = 1.0
# So many connections above the limit get an answer; others are cut.
_ANSWERED_ABOVE = 64
_LOG_EVERY_S = 60.0
_OUT_OF_HANDLES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def default_limit() -> int:
    """How many connections may be open: 1024, or fewer where the process may have few file handles."""
    if sys.platform == "win32":  # it has no such limit
        return 1024
    import resource

    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if handles == resource.RLIM_INFINITY else max(16, min(1024, handles * 3 // 4))


class RareLog:
    """Warnings of which each kind is written once a minute at most, with how many there were."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[float, int]] = {}

    def warn(self, kind: str) -> None:
        written, count = self._kinds.get(kind, (float("-inf"), 0))
        now = time.monotonic()
        if now - written < _LOG_EVERY_S:
            self._kinds[kind] = (written, count + 1)
            return
        self._kinds[kind] = (now, 0)
        log.warning("%s%s", kind, f" (and {count} times before)" if count else "")


rare = RareLog()


def loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's exception handler: without file handles every accept fails, with a traceback each."""
    if "._start_serving(" in context.get("message", ""):
        return  # asyncio tries to accept again, and the server has ended since
    cause = context.get("exception")
    if isinstance(cause, OSError) and cause.errno in _OUT_OF_HANDLES:
        rare.warn(f"a connection cannot be accepted: {cause.strerror}; --max-connections lowers their number")
    else:
        loop.default_exception_handler(context)


class Connection(HttpToolsProtocol):
    """One client's connection. uvicorn's `limit_concurrency` is how many may be open at once.

    A client that is refused gets an answer where none has begun, and its further input is dropped.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        # uvicorn's own check comes after the headers, and answers in plain text.
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._in_head = False
        self._complete = True
        self._refused = False
        # Counts what proves progress: a header block or a message that ended, a part of a body.
        self._progress = 0
        self._pending = 0
        self._messages = 0
        self._owed: tuple[int, bool, bool] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        above = len(self.connections) - (self._most or len(self.connections))
        if above > _ANSWERED_ABOVE:
            self._refused = True
            transport.abort()
        elif above > 0:
            rare.warn(f"a connection is refused: {self._most} are open (--max-connections)")
            message = f"this server has its {self._most} connections open"
            self._refuse(RequestError(message, status=503, code="too_many_connections", retry_after=1.0))
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._stop_timer()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unset_keepalive_if_required()
        progress = self._progress
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # An upgrade is optional: the request is answered as it stands.
        except httptools.HttpParserError as error:
            self._refuse(_cause(error))
            return
        self._pending = self._pending + len(data) if progress == self._progress else 0
        if self._pending > MAX_HEAD:
            self._refuse(self._too_large())
        else:
            self._watch()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._messages += 1
        self._in_head, self._complete = True, False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # a trailer is no header of the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD:
            raise self._too_large()
        if len(self.pipeline) >= PIPELINED:
            message = f"over {PIPELINED} requests wait on one connection"
            raise RequestError(message, status=429, code="too_many_requests")
        self._in_head = False
        self._progress += 1
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._progress += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._progress += 1
        self._complete = True
        super().on_message_complete()

    def _too_large(self) -> RequestError:
        if len(self.url) > MAX_HEAD // 2:
            return RequestError(f"the URL is over {MAX_HEAD // 1024} KiB", status=414, code="uri_too_long")
        message = f"the request's headers are over {MAX_HEAD // 1024} KiB"
        return RequestError(message, status=431, code="headers_too_large")

    def _watch(self) -> None:
        """Keep the time that the client has for what it still owes: a header block, a body, a request."""
        running = self.cycle is not None and not self.cycle.response_complete
        owed = None if self._complete and running else (self._messages, self._in_head, self._complete)
        if owed != self._owed:
            self._owed = owed
            self._stop_timer()
            if owed is not None:
                body = not (self._in_head or self._complete)
                self._timer = self.loop.call_later(BODY_S if body else HEAD_S, self._late)

    def _late(self) -> None:
        if self.flow.read_paused:
            # Its bytes are not read now, so it owes none.
            self._timer = self.loop.call_later(HEAD_S, self._late)
        elif self._complete:
            self.transport.close()
        else:
            what = "headers" if self._in_head else "body"
            message = f"the request's {what} did not arrive in time"
            self._refuse(RequestError(message, status=408, code="request_timeout"))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: RequestError) -> None:
        self._refused = True
        self._stop_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not self.pipeline:
            if not cycle.more_body:
                # An answer to the request before is on its way; the connection ends with it.
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
        if self.pipeline or (cycle is not None and not cycle.response_complete and cycle.response_started):
            self.transport.close()
            return
        body = json.dumps(error_body.openai(error)).encode("utf-8")
        status = HTTPStatus(error.status)
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", "content-type: application/json"]
        lines += [f"content-length: {len(body)}", "connection: close"]
        if error.retry_after is not None:
            lines.append(f"retry-after: {round(error.retry_after)}")
        self.transport.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_S, self.transport.abort)


def _cause(error: httptools.HttpParserError) -> RequestError:
    """What a parser's error means for the client: the refusal that a callback raised, or no HTTP at all."""
    if isinstance(error.__context__, RequestError):
        return error.__context__
    return RequestError(f"this is no HTTP request: {error}", code="invalid_http")
