"""The chat page and the page of the interface: what they hold, and that they run nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.fake_server import CLIENT, Server, fake_server

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


def test_the_page_runs_nothing_but_its_own_script(server: Server) -> None:
    response = server.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http:" not in response.text.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in response.text
    assert " style=" not in response.text
    assert CLIENT.head(server.url + "/").status_code == 200
    words = re.search(
        r"const WORDS = \{\n  en: \{(.*?)\n  \},\n  zh: \{(.*?)\n  \},\n\};", response.text, re.DOTALL
    )
    assert words is not None
    english, chinese = (set(re.findall(r"(\w+): [\"`(]", part)) for part in words.groups())
    assert english == chinese
    used = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', response.text))
    assert used <= english
