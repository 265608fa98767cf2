"""Request ids, and a line for each request."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.fake_server import ROOT, Server, fake_server

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with fake_server(reply="你好", context=256, origins=["https://app.example"]) as started:
        yield started


def test_request_ids_are_kept_or_made(server: Server) -> None:
    assert server.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = server.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", made)
    refused = server.get("/info", headers={"host": "evil.example"})
    assert refused.headers["x-request-id"]


@pytest.mark.slow
def test_a_line_for_each_request_and_no_prompt_in_it() -> None:
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stderr, "
        "format='%(levelname)s %(name)s: %(message)s'); from tests.support.fake_server import main; "
        "sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "{}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
    )
    assert process.stdout is not None
    url = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
    server = Server(process, url)
    try:
        server.wait()
        server.post("/generate", {"prompt": "my secret", "max_tokens": 2}, headers={"x-request-id": 'a"b'})
        server.get("/health")
    finally:
        process.terminate()
        _, text = process.communicate(timeout=20)
    [line] = [line for line in text.splitlines() if "/generate" in line]
    fields = r'INFO edge.http: id="a\\"b" method=POST route=/generate status=200 ms=\d+ model=fake'
    assert re.fullmatch(fields, line), line
    assert "secret" not in text
    assert "/health" not in text
