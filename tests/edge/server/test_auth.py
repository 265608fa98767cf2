"""Hosts, origins, keys and body sizes that are refused before any route."""

from __future__ import annotations

import base64
import json
import socket
import sys
import time

import pytest

from tests.support.fake_server import CLIENT, Server, error, launch


def test_a_foreign_host_or_origin_is_refused(spelling: Server) -> None:
    assert spelling.get("/info", headers={"host": "evil.example"}).status_code == 403
    assert spelling.get("/info", headers={"origin": "https://evil.example"}).status_code == 403
    assert spelling.get("/info", headers={"origin": spelling.url}).status_code == 200
    # What no client sends, and another reader may take for another host.
    for host in ("localhost#.evil.example", "localhost/", "[::1", "a@localhost", "localhost:80:80", ""):
        assert spelling.get("/info", headers={"host": host}).status_code == 403, host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:", "[::1]:8000"):
        assert spelling.get("/info", headers={"host": host}).status_code == 200, host
    request = b"GET /info HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(spelling.url.rsplit(":", 1)[1])), 5.0) as client:
        client.sendall(request)
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ") and b"several Host headers" in answer


@pytest.mark.slow
def test_an_api_key_opens_every_route_but_health() -> None:
    with launch(
        [sys.executable, "-m", "tests.support.fake_server", json.dumps({"keys": ["one", "two"]})]
    ) as server:
        key = {"authorization": "Bearer two"}
        until = time.monotonic() + 20
        while server.get("/ready", headers=key).status_code != 200 and time.monotonic() < until:
            time.sleep(0.05)
        assert server.get("/health").status_code == 200
        for path in ("/info", "/ready", "/docs", "/v1/models"):
            assert server.get(path).status_code == 401
            assert server.get(path, headers={"authorization": b"Bearer \xe9"}).status_code == 401
            assert server.get(path, headers=key).status_code == 200
        assert server.get("/ready", headers={"x-api-key": "one"}).status_code == 200


def test_a_body_over_the_limit_is_refused(spelling: Server) -> None:
    big = b'{"prompt": "' + b"x" * (5 * 2**20) + b'"}'
    headers = {"content-type": "application/json"}
    # Said at once, or counted as it comes: the same words.
    chunks = (big[i : i + 65536] for i in range(0, len(big), 65536))
    for content in (big, chunks):
        response = CLIENT.post(spelling.url + "/generate", content=content, headers=headers)
        assert response.status_code == 413
        assert error(response)["code"] == "body_too_large"
        assert error(response)["message"] == "the body is over 4194304 bytes"


def test_a_configured_origin_may_call_and_no_other(spelling: Server) -> None:
    allowed = spelling.get("/info", headers={"origin": "https://app.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    preflight = CLIENT.options(spelling.url + "/generate", headers=ask)
    assert preflight.status_code == 204
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    # The headers that are asked for are those that are allowed.
    names = "anthropic-version,content-type,x-stainless-lang, x-stainless-os"
    asked = CLIENT.options(
        spelling.url + "/v1/messages", headers={**ask, "access-control-request-headers": names}
    )
    assert asked.headers["access-control-allow-headers"] == names
    assert "access-control-request-headers" in asked.headers["vary"]
    odd = {**ask, "access-control-request-headers": "x: y".encode("latin-1") + b"\xe9"}
    assert (
        "authorization" in CLIENT.options(spelling.url, headers=odd).headers["access-control-allow-headers"]
    )
    for origin in ("app://obsidian.md", "http://localhost:5173"):
        given = spelling.get("/info", headers={"origin": origin})
        assert given.headers["access-control-allow-origin"] == origin
    other = {**ask, "origin": "https://app.example.evil"}
    refused = CLIENT.options(spelling.url + "/generate", headers=other)
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers


def test_images_and_forms_of_foreign_pages_are_refused(spelling: Server) -> None:
    for site in ("cross-site", "same-site"):
        response = spelling.get("/generate", params={"prompt": "x"}, headers={"sec-fetch-site": site})
        assert response.status_code == 403
    own = spelling.get("/generate", params={"prompt": "x"}, headers={"sec-fetch-site": "same-origin"})
    assert own.status_code == 200
    # A link to the page is harmless.
    assert spelling.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200
    assert spelling.get("/info", headers={"host": "[::1"}).status_code in (400, 403)


def test_any_content_type_is_read_as_json(spelling: Server) -> None:
    body = json.dumps({"model": "fake", "prompt": "x", "stream": False})
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8", None):
        headers = {"content-type": kind} if kind else {}
        response = CLIENT.post(spelling.url + "/api/generate", content=body, headers=headers)
        assert response.json()["response"] == "你好, world! <end>", kind


@pytest.mark.slow
def test_a_key_covers_the_page_too_and_a_browser_can_give_it() -> None:
    command = [sys.executable, "-m", "tests.support.fake_server", json.dumps({"keys": ["one"]})]
    with launch(command) as server:
        server.wait("/health")
        asked = server.get("/")
        assert asked.status_code == 401
        assert asked.headers["www-authenticate"].startswith("Basic")
        assert server.get("/v1/models").headers["www-authenticate"] == "Bearer"
        given = {"authorization": "Basic " + base64.b64encode(b"me:one").decode()}
        assert server.get("/", headers=given).status_code == 200
        assert server.get("/v1/models", headers=given).status_code == 200
        for bad in ("Basic !!!", "Basic " + base64.b64encode(b"one").decode(), "Basic /w=="):
            assert server.get("/", headers={"authorization": bad}).status_code == 401
