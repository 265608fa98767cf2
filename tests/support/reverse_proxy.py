"""A reverse proxy that puts a server under another path, as nginx does: the prefix goes, Host is its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def proxied(port: int, prefix: str) -> Iterator[str]:
    """The address of a proxy before 127.0.0.1:port. What is not under `prefix` gets 404."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            writer.close()
            return
        first, *lines = head.rstrip("\r\n").split("\r\n")
        method, path, version = first.split(" ")
        if not path.startswith(f"{prefix}/"):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            writer.close()
            return
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        changed = {"x-forwarded-host": headers["host"], "host": f"127.0.0.1:{port}"}
        if "upgrade" not in headers:
            changed["connection"] = "close"  # so that each request is seen here
        there = await asyncio.open_connection("127.0.0.1", port)
        request = [f"{method} {path.removeprefix(prefix)} {version}"]
        request += [f"{name}: {value}" for name, value in (headers | changed).items()]
        there[1].write(("\r\n".join(request) + "\r\n\r\n").encode("latin-1"))
        await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

    async def main() -> None:
        nonlocal address
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{prefix}"
        started.set()
        await ended.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    address, started, ended, loop = "", threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    started.wait(10)
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        loop.close()
