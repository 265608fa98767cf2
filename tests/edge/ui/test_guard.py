"""Who may use the page: over HTTP and over the websocket."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from edge.ui.guard import COOKIE, Guard

HOST = "127.0.0.1:7860"


async def _inner(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})


def ask(guard: Guard, kind: str = "http", **headers: str) -> tuple[int, dict[str, str]]:
    """(status, headers) of the answer; of a websocket 101 or 403."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    pairs = {"host": HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = [(name.encode(), value.encode()) for name, value in pairs.items()]
    scope = {"type": kind, "method": "GET", "path": "/", "headers": raw}
    asyncio.run(guard(scope, receive, send))  # type: ignore[arg-type]
    if kind == "websocket":
        return (101 if sent[0]["type"] == "websocket.accept" else 403), {}
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def password(key: str) -> str:
    return "Basic " + base64.b64encode(f"me:{key}".encode()).decode()


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_without_a_key_only_this_machine_and_this_origin(kind: str) -> None:
    guard, good = Guard(_inner, ()), 200 if kind == "http" else 101
    assert ask(guard, kind)[0] == good
    assert ask(guard, kind, origin=f"http://{HOST}")[0] == good
    assert ask(guard, kind, host="localhost:7860")[0] == good
    assert ask(guard, kind, host="evil.example:7860")[0] == 403
    assert ask(guard, kind, origin="http://evil.example")[0] == 403
    assert ask(guard, kind, origin="http://127.0.0.1:9999")[0] == 403
    assert ask(guard, kind, origin="null")[0] == 403
    # Nobody but a proxy may say so, and a page without a key has none.
    assert ask(guard, kind, origin="http://evil.example", x_forwarded_host="evil.example")[0] == 403


def test_links_of_other_sites_lead_here_but_their_images_and_scripts_do_not() -> None:
    guard = Guard(_inner, ())
    assert ask(guard, sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200
    assert ask(guard, sec_fetch_site="cross-site", sec_fetch_mode="no-cors")[0] == 403
    assert ask(guard, sec_fetch_site="same-origin", sec_fetch_mode="cors")[0] == 200


def test_a_key_is_a_password_once_and_a_cookie_from_then_on() -> None:
    guard = Guard(_inner, ("secret", "other"))
    status, headers = ask(guard)
    assert status == 401 and headers["www-authenticate"].startswith("Basic ")
    assert ask(guard, authorization=password("wrong"))[0] == 401
    assert ask(guard, "websocket")[0] == 403
    status, headers = ask(guard, authorization=password("other"), host="lab.example")
    assert status == 200
    cookie = headers["set-cookie"].partition(";")[0]
    assert cookie.startswith(f"{COOKIE}=") and "HttpOnly; SameSite=Strict" in headers["set-cookie"]
    assert ask(guard, "websocket", cookie=cookie, host="lab.example")[0] == 101
    assert "set-cookie" not in ask(guard, cookie=cookie)[1]
    assert ask(guard, "websocket", cookie=f"{COOKIE}=x")[0] == 403
    # The cookie does not open it to other origins; a proxy that names its host does.
    assert ask(guard, "websocket", cookie=cookie, origin="https://lab.example")[0] == 403
    seen = {"origin": "https://lab.example", "x_forwarded_host": "lab.example"}
    assert ask(guard, "websocket", cookie=cookie, **seen)[0] == 101


def test_the_browser_is_told_to_load_nothing_of_others() -> None:
    policy = ask(Guard(_inner, ()))[1]["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
