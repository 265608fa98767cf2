"""Whatever is sent, the answer is one that the interface knows, and the server is as before."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fake_server import CLIENT, Server, fake_server

pytestmark = pytest.mark.slow

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
# A valid body for each route, whose fields the fuzzer replaces.
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "hi", "json_schema": None, "regex": None, "logit_bias": {"1": 0}, "seed": 1},
    "/v1/chat/completions": {
        "messages": USER, "n": 1, "logprobs": True, "top_logprobs": 1, "tools": [TOOL], "tool_choice": "auto",
        "response_format": {"type": "text"}, "stream_options": None, "thinking_budget": 3, "logit_bias": None,
    },
    "/v1/completions": {"prompt": ["a", [1, 2]][:1], "echo": False, "n": 1, "logprobs": 1, "best_of": 1},
    "/v1/embeddings": {"input": ["a"], "encoding_format": "float", "dimensions": 16},
    "/v1/responses": {"input": USER, "text": {"format": {"type": "text"}}, "tools": [], "reasoning": None},
    "/v1/messages": {"messages": USER, "system": "s", "thinking": None, "tools": [], "stop_sequences": ["x"]},
    "/v1/messages/count_tokens": {"messages": USER, "system": [], "tools": []},
    "/api/chat": {"model": "fake", "messages": USER, "tools": [TOOL], "format": "json", "options": {}},
    "/api/generate": {"model": "fake", "prompt": "hi", "system": "s", "options": {}, "keep_alive": "5m"},
    "/api/embed": {"model": "fake", "input": ["a"], "truncate": True},
    "/api/show": {"model": "fake", "name": None},
    "/tokenize": {"text": "a", "messages": None, "special": True},
    "/detokenize": {"tokens": [97]},
}  # fmt: skip
# EDGE_FUZZ=1000 looks further.
EXAMPLES = int(os.environ.get("EDGE_FUZZ", "25"))
LIMITS = {"max_tokens": 4, "max_output_tokens": 4, "options": {"num_predict": 4}}
ALLOWED = {200, 400, 404, 408, 413}

texts = st.text(max_size=8) | st.sampled_from(
    ["\ud800", "\0", "👩‍🚀", "{{", "a" * 5000, "<|im_end|>", "none", "auto"]
)
numbers = st.integers(-3, 40) | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 1e308]) | st.floats()
KEYS = ["type", "role", "content", "text", "name", "function", "format", "schema", "tool_calls", "arguments"]
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "name", "function", "format", "schema", "x"])
            | texts,
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with fake_server(reply="ok, " * 5, context=256, slots=4, batch=64) as started:
        yield started
        info = started.until(lambda info: info["busy_slots"] == 0 and info["running"] == 0)
        assert info["restarts"] == 0
        assert started.post("/generate", {"prompt": "x"}).json()["generate_text"] == "ok, " * 5


@pytest.mark.parametrize("route", list(BODIES))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_any_body_gets_an_answer_that_is_known(server: Server, route: str, data: st.DataObject) -> None:
    body = {**LIMITS, **BODIES[route]} if route != "/api/show" else dict(BODIES[route])
    names = st.sampled_from([*body, "temperature", "top_p", "stop", "stream", "unheard_of"])
    for name in data.draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        body[name] = data.draw(values, label=name)
    if data.draw(st.booleans()) and isinstance(body.get("messages"), list) and body["messages"]:
        inner = {**USER[0], data.draw(st.sampled_from(KEYS)): data.draw(values)}
        body["messages"] = [*body["messages"], inner]
    text = json.dumps(body)
    response = CLIENT.post(server.url + route, content=text.encode("utf-8"))
    assert response.status_code in ALLOWED, (response.status_code, response.text[:300], text[:2000])
    if response.headers["content-type"] == "application/json":
        assert isinstance(response.json(), dict)
    if response.status_code != 200:
        assert "error" in response.json()


@pytest.mark.parametrize("depth", [50, 5000, 200_000])
def test_nesting_is_no_way_in(server: Server, depth: int) -> None:
    for text in ("[" * depth, '{"prompt":' + "[" * depth + "]" * depth + "}"):
        response = CLIENT.post(server.url + "/generate", content=text)
        assert response.status_code == 400
    deep: Any = {}
    for _ in range(200):
        deep = {"properties": {"a": deep}}
    response = server.post("/v1/chat/completions", {"messages": USER, "tools": [{**TOOL, "x": deep}]})
    assert response.status_code in (200, 400)


def test_clients_that_close_at_random_leave_nothing_behind(server: Server) -> None:
    draw = random.Random(7)
    port = int(server.url.rsplit(":", 1)[1])
    for _ in range(60):
        route = draw.choice([route for route in BODIES if "count" not in route])
        body = {**LIMITS, **BODIES[route], "stream": draw.random() < 0.8}
        body.pop("max_tokens" if draw.random() < 0.5 else "x", None)
        text = json.dumps(body).encode("utf-8")
        head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n".encode(
            "ascii"
        )
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(0.2)
            whole = head + text
            client.sendall(
                whole[: draw.choice([len(whole), len(whole), len(whole), draw.randrange(len(whole))])]
            )
            for _ in range(draw.randrange(4)):
                client.recv(draw.choice([1, 10, 400]))
            if draw.random() < 0.5:
                # Ends with a reset, not with a goodbye.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    info = server.until(lambda info: info["busy_slots"] == 0 and info["waiting"] == 0)
    assert info["restarts"] == 0
