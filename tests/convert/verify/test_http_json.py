"""Servers that are no model's, are down, refuse, redirect or say nothing: each is a sentence."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from convert.verify.http_json import Api, Refused, open_api
from edge.errors import EdgeError, InputError
from tests.support.engines import serving


@dataclass
class Stub:
    """Answers everything with one status and value."""

    status: int
    value: Any
    key: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        return self.status, self.value


@contextlib.contextmanager
def raw(reply: bytes | None) -> Iterator[str]:
    """The URL of a socket that writes `reply` and closes, or, for None, says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:

        def answer() -> None:
            connection = stack.enter_context(listener.accept()[0])
            if reply is not None:
                connection.recv(1000)
                connection.sendall(reply)
                connection.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def failure(url: str, **given: Any) -> EdgeError:
    with pytest.raises(EdgeError) as caught:
        Api(url, **{"limit": 5.0, **given}).ask("/v1/models", dict)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        (Stub(200, b"<html>"), "answers with text/html"),
        (Stub(200, [1]), "answers with JSON of another kind (Expected `object`, got `array`)"),
        (Stub(404, b"<h1>no</h1>"), "answers with HTTP 404"),
        (Stub(404, {"error": "no such model"}), "answers with HTTP 404: no such model"),
        (Stub(400, {"error": {"message": "top_logprobs"}}), "answers with HTTP 400: top_logprobs"),
        (Stub(422, {"detail": [{"msg": "x"}]}), "answers with HTTP 422"),
        (Stub(500, {"detail": "boom"}), "answers with HTTP 500: boom"),
    ],
)
def test_another_kind_of_server(stub: Stub, message: str) -> None:
    with serving(stub) as url:
        found = failure(url)
    assert isinstance(found, Refused) and found.message == f"{url}/v1/models {message}"


def test_keys() -> None:
    with serving(Stub(200, {"a": 1}, key="geheim")) as url:
        assert failure(url).message == f"{url}/v1/models wants a key (HTTP 401)"
        wrong = failure(url, key="other")
        assert "does not take this key" in wrong.message and "other" not in str(wrong)
        assert not isinstance(wrong, Refused)
        assert Api(url, "geheim").ask("/v1/models", dict) == {"a": 1}


def test_one_that_still_loads() -> None:
    with serving(Stub(503, {"error": {"message": "Loading model"}})) as url:
        found = failure(url)
    assert "is not ready (HTTP 503: Loading model)" in found.message and "wait" in found.hint


def test_a_redirect_is_named_and_not_followed() -> None:
    with serving(Stub(307, {}, headers={"Location": "https://elsewhere.example/v1"})) as url:
        assert failure(url).message.endswith("redirects to https://elsewhere.example/v1")


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert "does not answer" in failure(url).message
    assert "does not answer" in failure("http://no-such-host.invalid").message
    with raw(None) as url:
        assert "did not answer within 0.1 s" in failure(url, limit=0.1).message


def test_one_that_speaks_something_else() -> None:
    with raw(b"220 mail.example ESMTP\r\n") as url:
        assert "does not speak HTTP" in failure(url).message
    with raw(b"") as url:
        assert "does not speak HTTP" in failure(url).message
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with raw(head + b"{") as url:
        assert "JSON of another kind (Input data was truncated)" in failure(url).message


def test_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Stub(200, {})) as url:
        found = failure(url.replace("http:", "https:"))
    assert "no safe connection: " in found.message and "SSL_CERT_FILE" in found.hint

    def refuse(*_: Any, **__: Any) -> None:
        raise ssl.SSLCertVerificationError(1, "self-signed certificate")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", refuse)
    with serving(Stub(200, {})) as url:
        assert "self-signed certificate" in failure(url.replace("http:", "https:")).message


def test_a_proxy_of_the_environment_is_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(Stub(200, {"a": 1})) as url:
        assert Api(url).ask("/v1/models", dict) == {"a": 1}
    assert "does not answer" in failure("http://model.example").message


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://host/v1/", "http://host"),
        ("http://host:1/v1/chat/completions", "http://host:1"),
        ("http://host:11434/api", "http://host:11434"),
        ("https://host/gpu/v1", "https://host/gpu"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_urls(url: str, root: str) -> None:
    assert open_api(url, "").root == root


@pytest.mark.parametrize("url", ["http://", "http://host:x", "http://[::1", "http://me:secret@host"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(InputError) as caught:
        open_api(url, "")
    assert caught.value.hint
