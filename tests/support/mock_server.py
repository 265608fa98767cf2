"""A server whose delays are known: `python -m tests.support.mock_server FIRST GAP [PORT [CUT]]`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any


class Mock:
    """Speaks edge's interface: `first` seconds to the first token, `gap` between tokens.

    The baseline's too: GET /generate blocks everything and answers in one piece.

    cut: tokens after which it says `fault`: "stop" (an honest early end), "drop" (the connection ends) or
    "error" (an error event). status: of every answer. made: when each streamed answer's request came and its
    tokens went, on time.perf_counter: on a busy machine later than they should.
    """

    def __init__(self, first: float, gap: float, *, cut: int = 0, fault: str = "", status: int = 200) -> None:
        self.first, self.gap, self.cut, self.fault, self.status = first, gap, cut, fault, status
        self.bodies: list[dict[str, Any]] = []
        self.made: list[tuple[float, list[float]]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET /generate"):
            tokens = int(head.split("max_new_tokens=")[1].split()[0])
            made = min(tokens, self.cut or tokens)
            time.sleep(self.first + made * self.gap)  # noqa: ASYNC251 (as the baseline does)
            usage = {"prompt_tokens": 7, "completion_tokens": made}
            said = json.dumps({"generate_text": "la " * made, "usage": usage}).encode()
            writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(said)}\r\n\r\n".encode() + said)
        elif head.startswith("GET"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        elif self.status != 200:
            writer.write(f"HTTP/1.1 {self.status} No\r\ncontent-length: 5\r\n\r\nsorry".encode())
        else:
            length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
            self.bodies.append(json.loads(await reader.readexactly(length)))
            await self._stream(writer, self.bodies[-1]["max_tokens"])
        with contextlib.suppress(OSError):
            await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter, tokens: int) -> None:
        def event(said: Any) -> None:
            text = said if isinstance(said, str) else json.dumps(said)
            data = f"data: {text}\n\n".encode()
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        came, sent = time.perf_counter(), []
        self.made.append((came, sent))
        due = came + self.first
        made = min(tokens, self.cut or tokens)
        for _ in range(made):
            await asyncio.sleep(due - time.perf_counter())
            sent.append(time.perf_counter())
            event({"text": "la ", "tokens": 1})
            # Absolute times: a late wake-up does not shift all that follow.
            due += self.gap
        if self.fault == "drop":
            return
        if self.fault == "error":
            event({"error": {"message": "the engine has gone"}})
        else:
            usage = {"prompt_tokens": 7, "completion_tokens": made}
            event({"done": True, "finish_reason": "stop" if self.cut else "length", "usage": usage})
        event("[DONE]")
        writer.write(b"0\r\n\r\n")


@contextlib.asynccontextmanager
async def serving(mock: Any, port: int = 0) -> AsyncIterator[str]:
    server = await asyncio.start_server(mock, "127.0.0.1", port)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def main(first: float, gap: float, port: int, cut: int) -> None:
    async with serving(Mock(first, gap, cut=cut, fault="stop" if cut else ""), port) as url:
        sys.stdout.write(url + "\n")
        sys.stdout.flush()
        await asyncio.sleep(600)


if __name__ == "__main__":
    given_ = [*sys.argv[1:], "0", "0"][:4]
    asyncio.run(main(float(given_[0]), float(given_[1]), int(given_[2]), int(given_[3])))
