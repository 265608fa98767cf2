"""Ollama's interface: bodies, streams, errors."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from edge.errors import RequestError
from edge.server.api.ollama import seconds
from tests.support.fake_server import Server, user
from tests.support.family_server import REPLY, TOOL

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


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


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_u24_logprobs(server: Server, path: str) -> None:
    body = {"model": "fake", "messages": user()} if "chat" in path else {"model": "fake", "prompt": "x"}
    body |= {"logprobs": True, "top_logprobs": 3, "options": {"temperature": 0}}
    rows = lines(server.post(path, body))
    streamed = [entry for row in rows for entry in row.get("logprobs", [])]
    whole = server.post(path, {**body, "stream": False}).json()
    assert [e["token"] for e in whole["logprobs"]] == [e["token"] for e in streamed]
    assert b"".join(bytes(entry["bytes"]) for entry in streamed).decode() == REPLY
    for entry in streamed:
        assert set(entry) == {"token", "bytes", "logprob", "top_logprobs"}
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] <= 0
    assert "logprobs" not in server.post(path, {**body, "logprobs": False, "top_logprobs": 0}).text
    assert server.post(path, {**body, "logprobs": None}).status_code == 400
    assert server.post(path, {**body, "top_logprobs": 21}).status_code == 400


def test_u19_null_means_absent(server: Server) -> None:
    chat = [
        "stream",
        "options",
        "format",
        "think",
        "keep_alive",
        "tools",
        "logprobs",
        "top_logprobs",
        "template",
    ]
    rows = lines(server.post("/api/chat", {"model": "fake", "messages": user(), **dict.fromkeys(chat)}))
    assert "".join(row["message"]["content"] for row in rows) == REPLY
    generate = [*chat, "system", "raw", "images", "suffix", "context"]
    rows = lines(server.post("/api/generate", {"model": "fake", "prompt": "x", **dict.fromkeys(generate)}))
    assert "".join(row["response"] for row in rows) == REPLY
    names = [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
        "seed",
        "num_predict",
        "stop",
        "mirostat",
    ]
    options = dict.fromkeys(names)
    asked = {"model": "fake", "messages": user(), "options": options, "stream": False}
    assert server.post("/api/chat", asked).json()["message"]["content"] == REPLY
    calls = [{"id": None, "function": {"name": "f", "arguments": {"k": 1}, "index": None}}]
    turn = {"role": "assistant", "content": None, "thinking": None, "images": None, "tool_calls": calls}
    past = [*user(), turn, {"role": "tool", "content": "5", "tool_name": None, "tool_calls": None}]
    assert server.post("/api/chat", {**asked, "messages": past}).status_code == 200
    for path, extra in (("embed", {"input": "a"}), ("embeddings", {"prompt": "a"}), ("show", {})):
        nulls = dict.fromkeys(["keep_alive", "options", "truncate", "dimensions", "name"])
        assert server.post(f"/api/{path}", {"model": "fake", **extra, **nulls}).status_code == 200, path
    empty = server.post("/api/generate", {"model": "fake", "prompt": None, "keep_alive": None}).json()
    assert empty["done_reason"] == "load"


def test_a_sampling_field_outside_of_options_is_refused(server: Server) -> None:
    for extra in (
        {"temperature": 0},
        {"max_tokens": 5},
        {"tool_choice": "required"},
        {"options": {"top_a": 1}},
    ):
        response = server.post("/api/chat", {"model": "fake", "messages": user(), **extra})
        assert response.status_code == 400, extra
