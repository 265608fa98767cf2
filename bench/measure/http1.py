"""HTTP/1.1 and streams of events, as far as a load generator needs them: parsers of bytes, without sockets.

A general client costs several times as much per event, and the generator shares its cores with the server
that it measures.
"""

from __future__ import annotations

import json
from typing import Any

import httptools


class ProtocolError(Exception):
    """The server's bytes are not HTTP/1.1, or ended in the middle of an answer."""


def request(method: str, host: str, path: str, body: Any = None, *, key: str = "") -> bytes:
    """A whole request; `body`, where given, is sent as JSON, `key` as a bearer token.

    The connection is closed after the answer.
    """
    head = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
    head += f"authorization: Bearer {key}\r\n" if key else ""
    if body is None:
        return f"{head}\r\n".encode("ascii")
    data = json.dumps(body, ensure_ascii=False).encode("utf-8")
    head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode("ascii") + data


class Response:
    """An incremental reader of one response, by httptools. `status` and `headers` are set once the head has
    come, `done` at the end of the body.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._body = bytearray()
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body that `data` completes. Raises ProtocolError."""
        self._body.clear()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # A body that is whole may be followed by anything: the connection is closed.
            if not self.done:
                raise ProtocolError(f"not HTTP/1.1: {error}: {data[:60]!r}") from error
        return bytes(self._body)

    def eof(self) -> None:
        """The connection has ended. Raises ProtocolError unless the response was whole."""
        self.done |= bool(self.status) and not {"content-length", "transfer-encoding"} & self.headers.keys()
        if not self.done:
            raise ProtocolError("the connection ended in the middle of the answer")

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.done = True


class Lines:
    """Objects of a stream of JSON lines (NDJSON)."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[str]:
        *whole, self._buffer = (self._buffer + data).split(b"\n")
        return [line.decode("utf-8") for line in whole if line.strip()]


class Events(Lines):
    """Server-sent events out of a byte stream: the `data` of each, which is JSON on a single line."""

    def feed(self, data: bytes) -> list[str]:
        return [line[5:].strip() for line in super().feed(data) if line.startswith("data:")]
