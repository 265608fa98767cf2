"""What /metrics counts."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from edge.server.metrics import merged
from tests.support.fake_server import Server, fake_server

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    given = {"slots": 1, "cache_ram": 2**20}
    with fake_server(reply="你好", context=1024, origins=["https://app.example"], **given) as started:
        yield started


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


def test_prefixes_in_ram_are_told(server: Server) -> None:
    cached = []
    for word in ("one ", "two ", "one "):
        answer = server.post("/generate", {"prompt": 50 * word, "cache_prompt": True}).json()
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    # The template's head alone is common to both, and to earlier tests.
    assert cached[0] <= cached[1] < 10 and cached[2] > 200
    # The engine tells it a few times a second.
    until = time.monotonic() + 5
    while not (told := server.get("/info").json()["cache_ram"])["hits"] and time.monotonic() < until:
        time.sleep(0.05)
    assert told["limit"] == 2**20 and 0 < told["bytes"] <= 2**20
    assert (told["hits"], told["evictions"]) == (1, 0)
    text = server.get("/metrics").text
    assert f'edge_cache_ram_bytes{{model="fake"}} {told["bytes"]}' in text
    assert 'edge_cache_ram_hits_total{model="fake"} 1' in text


def test_replicas_pages_are_one() -> None:
    page = '# HELP a A.\n# TYPE a counter\na{model="m"} %d\n# HELP b B.\n# TYPE b gauge\n'
    more = page % 2 + 'b{x="{"} 1\n'
    assert merged({"r1": page % 1, 'r"2': more}) == (
        '# HELP a A.\n# TYPE a counter\na{replica="r1",model="m"} 1\na{replica="r\\"2",model="m"} 2\n'
        '# HELP b B.\n# TYPE b gauge\nb{replica="r\\"2",x="{"} 1\n'
    )
