"""Processes that train together watch one another, so that none waits in a sum for one that is gone.

Every process keeps a TCP connection to the first one. The system closes it when a process is killed, and its
keepalive notices a machine or a network that is gone, while a process that is only busy stays connected
whatever it computes. What the first process learns it tells all others. Lines of JSON go over a connection:

    {"token": "...", "rank": 1, "host": "name"}   the first line of a process
    {"end": ""}                                   its last one; or the message of the error that ended it
    {"lost": "process 1 on name is gone: ..."}    from the first process
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge.errors import EdgeError
from edge.progress import failure

# Keepalive: asked after 10 s of silence, then every 5 s; four answers that fail are the end, after 30 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
# Seconds for the connections, and for the first line of one.
_CONNECT_S, _HELLO_S = 60.0, 10.0
# Seconds that a process has to end by its own error once another one said how it ended.
GRACE_S = 5.0
HINT = "mend that, then go on from the last whole checkpoint: edge train CONFIG.yaml --resume"


@dataclass
class Link:
    """A connection to the process `rank` on `host`. text: what it sent since its last whole line."""

    socket: socket.socket
    rank: int
    host: str
    text: bytes = b""


class Peers:
    """The connections of one process, watched by a thread.

    end: called with the reason where another process is lost and this one did not end by itself. at_once: a
    process that vanished leaves no time for that, as NCCL would abort this one.
    """

    def __init__(self, links: list[Link], *, end: Callable[[str], None], at_once: bool = False) -> None:
        self._links, self._end, self._at_once = links, end, at_once
        self._reason, self._lost, self._left = "", threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def reason(self, wait: float = GRACE_S) -> str:
        """Why another process is lost, which may become known within `wait` seconds; "" if none is."""
        self._lost.wait(wait)
        return self._reason

    def leave(self, message: str = "") -> None:
        """Say that this process ends, with the message of its error; later losses are no matter of its."""
        self._left.set()
        self._tell({"end": message})
        for link in self._links:
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)

    def _tell(self, line: dict[str, str]) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.socket.sendall(_line(line))

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link.socket, selectors.EVENT_READ, link)
            while selector.get_map():
                for key, _ in selector.select():
                    last = _last_line(key.data)
                    if last is None:
                        continue
                    selector.unregister(key.fileobj)
                    key.data.socket.close()
                    self._ended(key.data, last)

    def _ended(self, link: Link, last: dict[str, str]) -> None:
        """Act upon the last line of a connection, {} where it ended without one."""
        who = f"process {link.rank} on {link.host}"
        gone = f"{who} is gone: it was killed, or its machine or the network failed"
        reason = last["lost"] if "lost" in last else f"{who} ended: {last['end']}" if last else gone
        if self._left.is_set() or self._reason or last.get("end") == "":
            return
        self._reason = reason
        self._tell({"lost": reason})
        self._lost.set()
        time.sleep(0 if self._at_once and " is gone: " in reason else GRACE_S)
        if not self._left.is_set():
            self._end(reason)


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode("ascii") + b"\n"


def _last_line(link: Link) -> dict[str, str] | None:
    """None while more may come; else the line that the connection ended with, {} where it has none."""
    try:
        data = link.socket.recv(65536)
    except OSError:
        data = b""
    link.text += data
    if data and b"\n" not in link.text:
        return None
    line, newline, _ = link.text.partition(b"\n")
    content: dict[str, str] = json.loads(line) if newline else {}
    return content


def exit_now(reason: str) -> None:
    """End this process, whatever its main thread waits for."""
    sys.stderr.write(f"error: {EdgeError(reason, HINT)}\n")
    sys.stderr.flush()
    failure(reason, HINT, 1)
    os._exit(1)


def listen() -> tuple[socket.socket, str]:
    """Where the first process is connected to, and the token that tells the others from strangers."""
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0), backlog=1024)
    return server, secrets.token_hex(16)


def accept(server: socket.socket, token: str, count: int) -> list[Link]:
    """The connections of `count` other processes. Raises EdgeError where they do not come in time."""
    links: list[Link] = []
    until = time.monotonic() + _CONNECT_S
    with server:
        while len(links) < count:
            server.settimeout(max(0.001, until - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError as error:
                raise EdgeError(
                    f"{count - len(links)} of {count} processes did not connect to {platform.node()}",
                    "open its TCP ports to the other nodes",
                ) from error
            connection.settimeout(_HELLO_S)
            try:
                with connection.makefile("rb") as file:
                    hello = json.loads(file.readline(1024))
                if not secrets.compare_digest(hello["token"], token):
                    raise ValueError("another token")
                links.append(Link(_kept_alive(connection), int(hello["rank"]), str(hello["host"])))
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()
    return links


def connect(address: tuple[str, int], token: str, *, rank: int, host: str) -> Link:
    """The connection of process `rank` to the first one, on `host`. Raises EdgeError where there is none."""
    try:
        connection = socket.create_connection(address, timeout=_CONNECT_S)
        connection.sendall(_line({"token": token, "rank": rank, "host": platform.node()}))
    except OSError as error:
        raise EdgeError(
            f"process {rank} on {platform.node()} cannot reach {host} at {address[0]}:{address[1]}: {error}",
            "open its TCP ports to the other nodes",
        ) from error
    return Link(_kept_alive(connection), 0, host)


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # each system has some of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
