"""Processes that watch one another: who is gone, who said why it ended, and who is only a stranger."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable

import pytest

from convert.train import peers
from convert.train.peers import Link, Peers
from edge.errors import EdgeError

Pair = Callable[[], tuple[Peers, Peers, Peers, socket.socket, "queue.Queue[tuple[str, str]]"]]


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Three processes, 0 to 2, and the socket of the last one; what ends them goes into a queue."""
    monkeypatch.setattr(peers, "GRACE_S", 0.05)

    def make() -> tuple[Peers, Peers, Peers, socket.socket, queue.Queue[tuple[str, str]]]:
        ends: queue.Queue[tuple[str, str]] = queue.Queue()
        (a, b), (c, d) = socket.socketpair(), socket.socketpair()
        first = Peers([Link(a, 1, "left"), Link(c, 2, "right")], end=lambda why: ends.put(("first", why)))
        second = Peers([Link(b, 0, "head")], end=lambda why: ends.put(("second", why)))
        third = Peers([Link(d, 0, "head")], end=lambda why: ends.put(("third", why)), at_once=True)
        return first, second, third, d, ends

    return make


def test_all_learn_who_is_gone(group: Pair) -> None:
    first, second, _, last, ends = group()
    last.shutdown(socket.SHUT_RDWR)
    gone = "process 2 on right is gone: it was killed, or its machine or the network failed"
    assert first.reason() == second.reason() == gone
    assert {("first", gone), ("second", gone)} <= {ends.get(timeout=5) for _ in range(3)}


def test_an_error_is_told_with_its_message_and_who_ends_by_himself_is_left_alone(group: Pair) -> None:
    first, second, third, _, ends = group()
    second.leave("no such file: rows.json")
    assert first.reason() == third.reason() == "process 1 on left ended: no such file: rows.json"
    first.leave("the same")
    assert ends.get(timeout=5) == ("third", third.reason())
    assert ends.empty()


def test_an_orderly_end_is_no_loss(group: Pair) -> None:
    everyone = group()
    for one in everyone[:3]:
        one.leave()
    assert [one.reason(0.05) for one in everyone[:3]] == ["", "", ""]
    assert everyone[4].empty()


def test_only_who_knows_the_token_is_let_in() -> None:
    server, token = peers.listen()
    address = ("127.0.0.1", server.getsockname()[1])
    links: list[Link] = []
    waiting = threading.Thread(target=lambda: links.extend(peers.accept(server, token, 1)))
    waiting.start()
    for text in (b"GET / HTTP/1.1\r\n\r\n", json.dumps({"token": "x", "rank": 1}).encode() + b"\n"):
        with socket.create_connection(address) as stranger:
            stranger.sendall(text)
            assert stranger.recv(1) == b""
    mine = peers.connect(address, token, rank=1, host="head")
    waiting.join(10)
    assert [link.rank for link in links] == [1]
    for link in (mine, *links):
        assert link.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert link.socket.gettimeout() is None
        link.socket.close()


def test_who_does_not_connect_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_CONNECT_S", 0.05)
    server, token = peers.listen()
    port = server.getsockname()[1]
    with pytest.raises(EdgeError, match="2 of 2 processes did not connect"):
        peers.accept(server, token, 2)
    with pytest.raises(EdgeError, match=f"process 1 on .* cannot reach head at 127.0.0.1:{port}"):
        peers.connect(("127.0.0.1", port), token, rank=1, host="head")
