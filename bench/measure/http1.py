"""Just enough HTTP/1.1 and server-sent events for a load generator: parsers that are fed bytes.

They know nothing of sockets. A general client costs several times as much per event, and the generator shares
its cores with the server that it measures.
"""

from __future__ import annotations

import json
from typing import Any


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
    """An incremental reader of one response. `status` and `headers` are there once the head has come."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._buffer = bytearray()
        self._left: int | None = (
            None  # bytes of the body or chunk that are still to come; None: until the end
        )
        self._state = "head"

    def feed(self, data: bytes) -> bytes:
        """The body bytes that `data` completes. Raises ProtocolError."""
        self._buffer += data
        body = b""
        while not self.done:
            if self._state == "head":
                if not self._head():
                    break
            elif self._state == "size":
                line = self._line()
                if line is None:
                    break
                self._size(line)
            elif self._state == "trailer":
                line = self._line()
                if line is None:
                    break
                self.done = line == b""
            elif self._state == "data-end":
                if len(self._buffer) < 2:
                    break
                del self._buffer[:2]
                self._state = "size"
            else:
                take = len(self._buffer) if self._left is None else min(self._left, len(self._buffer))
                body += self._buffer[:take]
                del self._buffer[:take]
                if self._left is None:
                    break
                self._left -= take
                if self._left:
                    break
                if self._state == "data":
                    self._state = "data-end"
                else:
                    self.done = True
        return body

    def eof(self) -> None:
        """The connection has ended. Raises ProtocolError unless the response was whole."""
        if self._state == "body" and self._left is None:
            self.done = True
        if not self.done:
            raise ProtocolError("the connection ended in the middle of the answer")

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise ProtocolError(f"not HTTP/1.1: {first[:60]!r}")
        self.status = int(rest[:3])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._state = "size"
        else:
            length = self.headers.get("content-length")
            self._state, self._left = "body", int(length) if length is not None else None
            self.done = self._left == 0
        return True

    def _size(self, line: bytes) -> None:
        try:
            self._left = int(line.split(b";")[0], 16)
        except ValueError:
            raise ProtocolError(f"not the size of a chunk: {line[:20]!r}") from None
        self._state = "data" if self._left else "trailer"


class Events:
    """Server-sent events out of a byte stream: the `data` of each, its lines joined."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[str]:
        self._buffer += data.replace(b"\r\n", b"\n")
        *whole, self._buffer = self._buffer.split(b"\n\n")
        found = []
        for block in whole:
            lines = [line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines).decode("utf-8"))
        return found


class Lines:
    """Objects of a stream of JSON lines (NDJSON)."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[str]:
        *whole, self._buffer = (self._buffer + data).split(b"\n")
        return [line.decode("utf-8") for line in whole if line.strip()]
