"""Ollama's and Anthropic's interfaces: their bodies, streams, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from edge.errors import RequestError
from edge.server.api.ollama import seconds
from tests.support.fake_server import Server, fake_server

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow

REPLY = "你好, world!"
CALL = '<tool_call>\n{"name": "f", "arguments": {"k": 1}}\n</tool_call>'
TOOL = {"type": "object", "properties": {"k": {"type": "integer"}}}
THINKER = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    common = {"context": 512, "slots": 4, "batch": 128}
    models = {
        "fake": {**common, "reply": REPLY, "script": [["<tool>", "done"], ["please", "Sure. " + CALL]]},
        "thinker": {**common, "reply": "well</think>\n\nseven", "chat_template": THINKER},
    }
    with fake_server(models=models) as started:
        yield started


def user(text: Any = "hi") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


# -- Ollama ----------------------------------------------------------------------------------------------


def test_ollama_streams_unless_told_not_to(server: Server) -> None:
    rows = lines(server.post("/api/chat", {"model": "fake", "messages": user()}))
    assert "".join(row["message"]["content"] for row in rows) == REPLY
    assert [row["done"] for row in rows] == [False] * (len(rows) - 1) + [True]
    last = rows[-1]
    assert last["done_reason"] == "stop"
    assert last["eval_count"] == len(REPLY.encode()) + 1
    whole = last["total_duration"]
    assert whole >= last["prompt_eval_duration"] + last["eval_duration"] > 0
    one = server.post("/api/generate", {"model": "fake", "prompt": "x", "stream": False}).json()
    assert one["response"] == REPLY


def test_ollama_options(server: Server) -> None:
    def ask(**options: Any) -> httpx.Response:
        body = {"model": "fake:latest", "prompt": "x", "stream": False, "options": options}
        return server.post("/api/generate", body)

    assert ask(num_predict=3, num_ctx=99999, num_gpu=1).json()["done_reason"] == "length"
    assert ask(num_predict=-1, stop=["world"]).json()["response"] == "你好, "
    for bad in ({"mirostat": 2}, {"temperature": 9}, {"repeat_penalty": 1.1, "repeat_last_n": 64}):
        response = ask(**bad)
        assert response.status_code == 400
        assert set(response.json()) == {"error"}


def test_ollama_tools_thoughts_and_formats(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": TOOL}}]
    asked = {"model": "fake", "messages": user("please"), "tools": tools, "options": {"temperature": 0}}
    rows = lines(server.post("/api/chat", asked))
    [calls] = [row["message"]["tool_calls"] for row in rows if "tool_calls" in row["message"]]
    assert calls == [{"function": {"name": "f", "arguments": {"k": 1}}}]
    past = {"role": "assistant", "content": "", "tool_calls": calls}
    turns = [*user("please"), past, {"role": "tool", "tool_name": "f", "content": "5"}]
    again = server.post("/api/chat", {**asked, "messages": turns, "stream": False}).json()
    assert again["message"]["content"] == "done"
    thought = server.post("/api/chat", {"model": "thinker", "messages": user(), "stream": False}).json()
    assert thought["message"] == {"role": "assistant", "content": "seven", "thinking": "well"}
    shaped = {"model": "fake", "messages": user(), "stream": False, "format": {"enum": [7]}}
    assert server.post("/api/chat", shaped).json()["message"]["content"] == "7"
    image = [{"role": "user", "content": "x", "images": ["aGk="]}]
    assert "text model" in server.post("/api/chat", {"model": "fake", "messages": image}).json()["error"]


def test_ollama_models(server: Server) -> None:
    assert [m["name"] for m in server.get("/api/tags").json()["models"]] == ["fake", "thinker"]
    shown = server.post("/api/show", {"model": "thinker"}).json()
    assert shown["capabilities"] == ["completion", "thinking", "embedding"]
    assert server.post("/api/show", {"name": "fake"}).json()["capabilities"][1] == "tools"
    assert {"fake", "thinker"} == {m["name"] for m in server.get("/api/ps").json()["models"]}
    assert server.get("/api/version").json()["version"]
    assert len(server.post("/api/embed", {"model": "fake", "input": ["a", "b"]}).json()["embeddings"]) == 2
    gone = server.post("/api/generate", {"model": "thinker", "keep_alive": 0}).json()
    assert gone["done_reason"] == "unload"
    assert [m["name"] for m in server.get("/api/ps").json()["models"]] == ["fake"]
    back = server.post("/api/generate", {"model": "thinker", "keep_alive": "1h"}).json()
    assert back["done_reason"] == "load"
    missing = server.post("/api/show", {"model": "nobody"})
    assert missing.status_code == 404
    assert set(missing.json()) == {"error"}


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("-1", -1.0),
        ("-1s", -1.0),
        ("10", 10.0),
        (0, 0),
        (None, None),
        ("1.5s", 1.5),
    ],
)
def test_ollama_durations(given: Any, want: Any) -> None:
    assert seconds(given) == want


@pytest.mark.parametrize("given", ["", "m5", "5x", "--5"])
def test_ollama_durations_that_are_none(given: str) -> None:
    with pytest.raises(RequestError, match="no duration"):
        seconds(given)


# -- Anthropic -------------------------------------------------------------------------------------------


def events(response: httpx.Response) -> list[dict[str, Any]]:
    rows = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        row = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {row['type']}"
        rows.append(row)
    return rows


def test_anthropic_events_come_in_order(server: Server) -> None:
    body = {"model": "thinker", "max_tokens": 99, "messages": user(), "stream": True}
    rows = events(server.post("/v1/messages", body))
    kinds = [row["type"] for row in rows if row["type"] != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    assert kinds == ["message_start", *block, *block, "message_delta", "message_stop"]
    deltas = [row["delta"] for row in rows if row["type"] == "content_block_delta"]
    assert "".join(d.get("thinking", "") for d in deltas) == "well"
    assert "".join(d.get("text", "") for d in deltas) == "seven"
    counted = server.post("/v1/messages/count_tokens", {"model": "thinker", "messages": user()}).json()
    assert rows[0]["message"]["usage"]["input_tokens"] == counted["input_tokens"] == len("hi<think>")
    usage = rows[-2]["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"]


def test_anthropic_tools_and_blocks(server: Server) -> None:
    tools = [{"name": "f", "input_schema": TOOL}]
    asked = {"model": "fake", "max_tokens": 200, "tools": tools, "temperature": 0}
    first = server.post("/v1/messages", {**asked, "messages": user("please")}).json()
    assert [block["type"] for block in first["content"]] == ["text", "tool_use"]
    assert (first["stop_reason"], first["content"][1]["input"]) == ("tool_use", {"k": 1})
    result = {
        "type": "tool_result",
        "tool_use_id": first["content"][1]["id"],
        "content": [{"type": "text", "text": "5"}],
    }
    turns = [
        *user("please"),
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result]},
    ]
    again = server.post("/v1/messages", {**asked, "messages": turns}).json()
    assert again["content"] == [{"type": "text", "text": "done"}]
    rows = events(server.post("/v1/messages", {**asked, "messages": user("please"), "stream": True}))
    starts = [row["content_block"] for row in rows if row["type"] == "content_block_start"]
    assert [start["type"] for start in starts] == ["text", "tool_use"]
    parts = [r["delta"]["partial_json"] for r in rows if r.get("delta", {}).get("type") == "input_json_delta"]
    assert json.loads("".join(parts)) == {"k": 1}


def test_anthropic_stops_and_errors(server: Server) -> None:
    def ask(**extra: Any) -> httpx.Response:
        return server.post("/v1/messages", {"max_tokens": 99, "messages": user(), **extra})

    assert ask(stop_sequences=["world"]).json()["stop_sequence"] == "world"
    assert ask(max_tokens=2).json()["stop_reason"] == "max_tokens"
    image = [{"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x"}}]
    for bad in (
        {"temperature": 1.5},
        {"max_tokens": None},
        {"messages": user(image)},
        {"mcp_servers": [{"url": "http://x"}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"messages": user([{"type": "tool_result"}])},
    ):
        response = ask(**bad)
        assert response.status_code == 400, bad
        assert response.json()["error"]["type"] == "invalid_request_error"
    missing = ask(model="nobody")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    shaped = {"format": {"type": "json_schema", "schema": {"enum": [7]}}}
    assert ask(output_config=shaped).json()["content"][0]["text"] == "7"
