"""A reverse proxy that puts a server under another path, as nginx does: the prefix goes, Host is its own."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def proxied(port: int, prefix: str) -> Iterator[str]:
    """The address of a proxy before 127.0.0.1:port. What is not under `prefix` gets 404."""
    there = (f"127.0.0.1:{port}", port, prefix)
    handler = type("Handler", (_Handler,), {"there": there})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}{prefix}"
        finally:
            server.shutdown()
            thread.join(10)


class _Handler(socketserver.StreamRequestHandler):
    there = ("", 0, "")

    def handle(self) -> None:
        host, port, prefix = self.there
        lines = []
        while line := self.rfile.readline().decode("latin-1").rstrip("\r\n"):
            lines.append(line)
        if not lines:
            return
        method, path, version = lines[0].split(" ")
        if not path.startswith(f"{prefix}/"):
            self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        changed = {"x-forwarded-host": headers["host"], "host": host}
        if "upgrade" not in headers:
            changed["connection"] = "close"  # so that each request is seen here
        request = [f"{method} {path.removeprefix(prefix)} {version}"]
        request += [f"{name}: {value}" for name, value in (headers | changed).items()]
        with socket.create_connection(("127.0.0.1", port)) as upstream:
            upstream.sendall(("\r\n".join(request) + "\r\n\r\n").encode("latin-1"))
            back = threading.Thread(target=_pipe, args=(upstream, self.connection))
            back.start()
            _pipe(self.connection, upstream)
            back.join()


def _pipe(source: socket.socket, target: socket.socket) -> None:
    """All bytes of one side to the other, then its end."""
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)
