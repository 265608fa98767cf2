"""Who gets in, what is logged and counted, and the page that browsers get."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from edge.errors import UsageError
from edge.server.cli import check_origin
from tests.support.fake_server import ROOT, Server, fake_server, launch

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with fake_server(reply="你好", context=256, origins=["https://app.example"]) as started:
        yield started


def test_a_configured_origin_may_call_and_no_other(server: Server) -> None:
    allowed = server.get("/info", headers={"origin": "https://app.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    preflight = httpx.options(server.url + "/generate", headers=ask)
    assert preflight.status_code == 204
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    other = {**ask, "origin": "https://app.example.evil"}
    refused = httpx.options(server.url + "/generate", headers=other)
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers


def test_images_and_forms_of_foreign_pages_are_refused(server: Server) -> None:
    for site in ("cross-site", "same-site"):
        response = server.get("/generate", params={"prompt": "x"}, headers={"sec-fetch-site": site})
        assert response.status_code == 403
    own = server.get("/generate", params={"prompt": "x"}, headers={"sec-fetch-site": "same-origin"})
    assert own.status_code == 200
    # A link to the page is harmless.
    assert server.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200
    assert server.get("/info", headers={"host": "[::1"}).status_code in (400, 403)


@pytest.mark.parametrize("origin", ["*", "app.example", "https://", "https://a.example/path", "ftp://a"])
def test_an_origin_that_is_none_is_refused_at_start(origin: str) -> None:
    with pytest.raises(UsageError, match="no origin"):
        check_origin(origin)


def test_request_ids_are_kept_or_made(server: Server) -> None:
    assert server.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = server.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", made)
    refused = server.get("/info", headers={"host": "evil.example"})
    assert refused.headers["x-request-id"]


def test_any_content_type_is_read_as_json(server: Server) -> None:
    body = json.dumps({"model": "fake", "prompt": "x", "stream": False})
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"):
        response = httpx.post(server.url + "/api/generate", content=body, headers={"content-type": kind})
        assert response.json()["response"] == "你好", kind
    assert httpx.post(server.url + "/api/generate", content=body).json()["response"] == "你好"


def test_metrics_count_what_was_done(server: Server) -> None:
    def value(name: str) -> float:
        text = server.get("/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = [
        'edge_http_requests_total{route="/generate",method="POST",status="200"}',
        'edge_answers_total{model="fake",reason="stop"}',
        'edge_completion_tokens_total{model="fake"}',
        'edge_time_to_first_token_seconds_count{model="fake"}',
        'edge_time_to_first_token_seconds_bucket{model="fake",le="+Inf"}',
        'edge_answer_seconds_count{model="fake"}',
    ]
    before = [value(name) for name in names]
    assert server.post("/generate", {"prompt": "x"}).status_code == 200
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [1, 1, 7, 1, 1, 1]
    assert value('edge_ready{model="fake"}') == 1
    assert value('edge_kv_cells{model="fake"}') == 1024
    text = server.get("/metrics").text
    kinds = re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE)
    assert len(kinds) == len({name for name, _ in kinds})
    for line in text.splitlines():
        assert line.startswith("# ") or re.fullmatch(r'[a-z_]+(\{([a-z]+="[^"]*",?)+\})? [0-9.e+-]+', line), (
            line
        )
    unknown = 'edge_http_requests_total{route="other",method="GET",status="404"}'
    old = value(unknown)
    server.get("/no/such/" + "path")
    assert value(unknown) == old + 1


@pytest.mark.slow
def test_a_line_for_each_request_and_no_prompt_in_it() -> None:
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stderr, "
        "format='%(levelname)s %(name)s: %(message)s'); from tests.support.fake_server import main; sys.exit(main())"
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
        _, said = process.communicate(timeout=20)
    [line] = [line for line in said.splitlines() if "/generate" in line]
    fields = r'INFO edge.http: id="a\\"b" method=POST route=/generate status=200 ms=\d+ model=fake'
    assert re.fullmatch(fields, line), line
    assert "secret" not in said
    assert "/health" not in said


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
    assert httpx.head(server.url + "/").status_code == 200
    words = re.search(
        r"const WORDS = \{\n  en: \{(.*?)\n  \},\n  zh: \{(.*?)\n  \},\n\};", response.text, re.DOTALL
    )
    assert words is not None
    english, chinese = (set(re.findall(r"(\w+): [\"`(]", part)) for part in words.groups())
    assert english == chinese
    used = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', response.text))
    assert used <= english
