"""What stands in front of Ray's proxy, over proxies that are made up."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from edge.errors import RequestError
from edge.server import ray_entrance
from edge.server.auth import MAX_BODY
from edge.server.ray_entrance import Entrance, session

SYSTEM = {"role": "system", "content": "Be short."}


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def name(**fields: Any) -> str:
    return session(json.dumps(fields).encode("utf-8"))


def test_a_conversation_keeps_its_session_while_it_grows() -> None:
    first = name(messages=[SYSTEM, asked("Who are you?")])
    grown = [SYSTEM, asked("Who are you?"), {"role": "assistant", "content": "A conch."}, asked("And now?")]
    assert name(messages=grown, temperature=1, stream=True) == first
    assert name(messages=[SYSTEM, asked("Who am I?")]) != first
    assert name(messages=[asked("Who are you?")]) != first
    assert name(messages=[asked("Who are you?")], system="Be short.") != name(
        messages=[asked("Who are you?")]
    )
    assert name(input=[asked("a"), asked("b")]) == name(input=[asked("a")])
    assert name(prompt="x" * 300 + "one") == name(prompt="x" * 300 + "two") != name(prompt="y" * 300)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"messages": []}', b'{"prompt": 7}', b'{"messages": [null, 3]}', b"\xff"],
)
def test_what_is_no_conversation_is_let_through(body: bytes) -> None:
    assert isinstance(session(body), str)


class Proxy:
    """Ray's proxy as the entrance sees it: it sends `messages`, and keeps what it was asked."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages = messages
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = dict(scope["headers"])
        self.body = (await receive())["body"]
        for message in self.messages:
            await send(message)


def start(status: int, kind: str, *more: tuple[bytes, bytes]) -> dict[str, Any]:
    headers = [(b"content-type", kind.encode()), *more]
    return {"type": "http.response.start", "status": status, "headers": headers}


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def post(
    proxy: Proxy, path: str = "/v1/chat/completions", content: bytes = b"{}", **headers: str
) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Entrance(proxy))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(ask())


def test_the_session_is_named_to_the_router_and_the_body_goes_on() -> None:
    proxy = Proxy(
        start(200, "application/json", (b"x-request-id", b"a"), (b"x-request-id", b"a")), part(b"{}", False)
    )
    body = json.dumps({"messages": [asked("hi")]}).encode()
    answer = post(proxy, content=body)
    assert (answer.text, answer.headers.get_list("x-request-id")) == ("{}", ["a"])
    assert proxy.body == body
    assert proxy.headers[b"x-session-id"] == session(body).encode()
    post(proxy, content=body, **{"x-session-id": "mine"})
    assert proxy.headers[b"x-session-id"] == b"mine"


def test_a_body_over_the_bound_goes_no_further() -> None:
    proxy = Proxy()
    answer = post(proxy, content=b" " * (MAX_BODY + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert proxy.headers == {}


@pytest.mark.parametrize(
    ("messages", "status", "code"),
    [
        ((), 503, "replica_lost"),
        ((start(500, "text/plain"), part(b"The actor died", False)), 503, "replica_lost"),
        ((start(404, "text/plain"), part(b"Path not found", False)), 503, "no_replica"),
        ((start(429, "text/plain"), part(b"dropped", False)), 429, "queue_full"),
    ],
)
def test_rays_own_words_become_the_familys_error(messages: Any, status: int, code: str) -> None:
    answer = post(Proxy(*messages))
    assert (answer.status_code, answer.headers["retry-after"]) == (status, "1")
    assert answer.json()["error"]["code"] == code
    other = post(Proxy(*messages), "/v1/messages").json()
    assert other["type"] == "error" and "error" in other


def test_the_applications_errors_stay() -> None:
    answer = post(Proxy(start(404, "application/json"), part(b'{"error": 1}', False)))
    assert (answer.status_code, answer.text) == (404, '{"error": 1}')


@pytest.mark.parametrize(
    ("path", "kind", "end"),
    [
        ("/v1/chat/completions", "text/event-stream; charset=utf-8", "data: [DONE]\n\n"),
        ("/v1/messages", "text/event-stream", "event: error\n"),
        ("/v1/responses", "text/event-stream", "event: error\n"),
        ("/api/chat", "application/x-ndjson", '{"error":'),
    ],
)
def test_a_torn_stream_ends_with_its_familys_error(path: str, kind: str, end: str) -> None:
    text = post(Proxy(start(200, kind), part(b"one\n\n")), path).text
    assert text.startswith("one\n\n") and end in text and "ask again" in text
    whole = post(Proxy(start(200, kind), part(b"one\n\n"), part(b"", False)), path)
    assert whole.text == "one\n\n"


def get(path: str, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Entrance(Proxy()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


def test_the_state_is_what_the_replicas_told_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_API_KEY", raising=False)
    monkeypatch.setattr(ray_entrance, "states", {})
    assert (get("/ready").status_code, get("/metrics").status_code) == (503, 503)
    page = '# HELP a A.\n# TYPE a counter\na{m="x"} %d\n'
    gone = RequestError("no", status=503, code="model_failed")
    first = {"/ready": gone, "/metrics": page % 1}
    states = {"r1": first, "r2": {"/ready": {"status": "ready"}, "/metrics": page % 2}, "r3": {}}
    monkeypatch.setattr(ray_entrance, "states", states)
    assert get("/ready").json() == {"status": "ready"}
    assert get("/metrics").text.splitlines()[2:] == ['a{replica="r1",m="x"} 1', 'a{replica="r2",m="x"} 2']
    monkeypatch.setattr(ray_entrance, "states", {"r1": first})
    assert (get("/ready").status_code, get("/ready").json()["error"]["code"]) == (503, "model_failed")
    assert get("/ready", host="evil.example").status_code == 403


def test_the_state_needs_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_entrance, "states", {"r": {"/ready": {}, "/health": {}}})
    (tmp_path / "keys").write_text("one\n", "utf-8")
    monkeypatch.setenv(ray_entrance.KEY_FILE_VARIABLE, str(tmp_path / "keys"))
    assert get("/ready").status_code == 401
    assert get("/health").status_code == 200
    assert get("/ready", authorization="Bearer one").status_code == 200
