"""Anthropic's interface: bodies, streams, errors."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support.fake_server import Server, named_events, user
from tests.support.family_server import TOOL

# Seconds of servers and training: left out of the quick part.
pytestmark = pytest.mark.slow


def test_anthropic_events_come_in_order(server: Server) -> None:
    body = {"model": "thinker", "max_tokens": 99, "messages": user(), "stream": True}
    rows = named_events(server.post("/v1/messages", body))
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
    rows = named_events(server.post("/v1/messages", {**asked, "messages": user("please"), "stream": True}))
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
        {"messages": user([{"type": ["text"], "text": "x"}])},
        {"messages": user([{"type": "text", "text": 5}])},
        {"system": [{"type": {}, "text": "x"}]},
    ):
        response = ask(**bad)
        assert response.status_code == 400, bad
        assert response.json()["error"]["type"] == "invalid_request_error"
    missing = ask(model="nobody")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    shaped = {"format": {"type": "json_schema", "schema": {"enum": [7]}}}
    assert ask(output_config=shaped).json()["content"][0]["text"] == "7"


KEEP_ALL = {"type": "clear_thinking_20251015", "keep": "all"}
CLEAR = {"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": 1}}
TOOL_USES = {"type": "clear_tool_uses_20250919", "trigger": {"type": "input_tokens", "value": 1}}
THOUGHT = [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "yes"}]
USED = [{"type": "tool_use", "id": "t1", "name": "f", "input": {}}]
RESULT = [{"type": "tool_result", "tool_use_id": "t1", "content": "5"}]


@pytest.mark.parametrize(
    ("given", "turns", "status"),
    [
        (None, [], 200),
        ({}, [], 200),
        ({"edits": []}, [THOUGHT, "x"], 200),
        ({"edits": [KEEP_ALL]}, [THOUGHT, "x"], 200),
        ({"edits": [CLEAR]}, ["yes", "x"], 200),
        ({"edits": [CLEAR]}, [THOUGHT, "x"], 400),
        ({"edits": [KEEP_ALL, TOOL_USES]}, [THOUGHT, "x"], 200),
        ({"edits": [TOOL_USES]}, [USED, RESULT], 400),
        ({"edits": [{"type": "compact_20260112"}]}, [], 400),
        ({"edits": [{"type": "clear_everything_20300101"}]}, [], 400),
        ({"edits": "all"}, [], 400),
    ],
)
def test_u15_a_context_edit_is_taken_where_it_changes_nothing(
    server: Server, given: Any, turns: list[Any], status: int
) -> None:
    messages = [
        *user(),
        *({"role": r, "content": c} for r, c in zip(("assistant", "user"), turns, strict=False)),
    ]
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        body = {"max_tokens": 9, "messages": messages, "context_management": given}
        response = server.post(path, body)
        assert response.status_code == status, response.text
        if status == 400:
            assert "context_management" in response.json()["error"]["message"]


def test_u22_a_call_that_is_cut_leaves_no_mark(server: Server) -> None:
    body = {"tools": [{"name": "f", "input_schema": TOOL}], "temperature": 0, "messages": user("please")}
    answer = server.post("/v1/messages", {**body, "max_tokens": 30}).json()
    assert (answer["content"], answer["stop_reason"]) == ([{"type": "text", "text": "Sure."}], "max_tokens")
