"""The chat page and the page of the interface, as a whole server gives them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.support.fake_server import CLIENT, Server, fake_server, launch

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with fake_server(reply="你好", context=256, origins=["https://app.example"]) as started:
        yield started


def test_the_interface_is_shown_and_runs_nothing(server: Server) -> None:
    response = server.get("/docs")
    assert "script-src 'none'" in response.headers["content-security-policy"]
    assert "http" not in response.text
    assert "<script" not in response.text
    document = server.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<h2>{method.upper()} {path}</h2>" in response.text
    assert "max_completion_tokens" in response.text


def test_the_page_and_its_files_need_the_key() -> None:
    """A browser asks for it at the page, and sends it along with the files."""
    command = [sys.executable, "-m", "tests.support.fake_server", json.dumps({"keys": ["secret"]})]
    with launch(command) as server:
        for path in ("/", "/web/page.js"):
            assert server.get(path).status_code == 401
            assert server.get(path, auth=("", "secret")).status_code == 200
        assert server.get("/").headers["www-authenticate"].startswith("Basic")


def test_head_is_answered(server: Server) -> None:
    for path in ("/", "/web/page.js"):
        assert CLIENT.head(server.url + path).status_code == 200
