"""Tool calls over HTTP: streamed or not, forced, strict, beside a format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_server import CHAT, Server, fake_server, user
from tests.support.tool_templates import ANSWERS, SCHEMA

TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]
# How a tool's result is marked.
RESULTS = ["output▁begin", "tool\n5", "tool<|end", "[TOOL_RESULTS] 5", "tool: 5"]


@pytest.fixture(
    scope="module",
    params=["hermes", *(pytest.param(name, marks=pytest.mark.slow) for name in [*ANSWERS][1:])],
)
def caller(request: pytest.FixtureRequest) -> Iterator[Server]:
    answer, template = ANSWERS[request.param]
    with fake_server(
        script=[*([mark, "done"] for mark in RESULTS), ["please", answer]],
        reply="I will not.",
        chat_template=template,
        context=2048,
        batch=256,
    ) as server:
        yield server


@pytest.mark.slow
def test_a_call_streamed_or_not(caller: Server) -> None:
    body = {"messages": user("please"), "tools": TOOLS, "temperature": 0}
    choice = caller.post(CHAT, body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "f")
    assert json.loads(call["function"]["arguments"]) == {"k": "你"}
    rows = caller.post(CHAT, {**body, "stream": True}).text.split("\n\n")
    deltas = [json.loads(row[6:])["choices"][0] for row in rows if row.startswith("data: {")]
    [part] = [p for d in deltas for p in d["delta"].get("tool_calls", [])]
    assert (part["index"], part["function"]["name"]) == (0, "f")
    assert deltas[-1]["finish_reason"] == "tool_calls"
    assert "".join(d["delta"].get("content") or "" for d in deltas) == ""


@pytest.mark.parametrize("limit", [5, 12, 20, 33])
def test_u22_a_call_that_is_cut_off_is_no_call_and_leaves_no_mark(caller: Server, limit: int) -> None:
    body = {"messages": user("please"), "tools": TOOLS, "temperature": 0, "max_tokens": limit}
    choice = caller.post(CHAT, body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    # A bare object that has not yet named an offered tool may be any JSON, and stays text.
    assert choice["message"]["content"].rstrip("\ufffd") in ("", '{"nam', '{"name": "f'[:limit])
    rows = caller.post(CHAT, {**body, "stream": True}).text.split("\n\n")
    deltas = [json.loads(row[6:])["choices"][0] for row in rows if row.startswith("data: {")]
    assert "".join(d["delta"].get("content") or "" for d in deltas) == choice["message"]["content"]
    assert deltas[-1]["finish_reason"] == "length"


def test_the_result_goes_back_to_the_model(caller: Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"k": "1"}'}}
    turns = [
        *user("please"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    ]
    message = caller.post(CHAT, {"messages": turns, "tools": TOOLS, "temperature": 0}).json()["choices"][0]
    assert message["message"]["content"] == "done"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_forced_call_fits_the_schema_whatever_the_model_wants(caller: Server, choice: Any) -> None:
    body = {"messages": user("no"), "tools": TOOLS, "tool_choice": choice, "seed": 3}
    answer = caller.post(CHAT, {**body, "parallel_tool_calls": False}).json()["choices"][0]
    [call] = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "f"
    arguments = json.loads(call["function"]["arguments"])
    assert set(arguments) == {"k"}
    assert len(arguments["k"]) <= 3


def test_none_means_no_tools_and_auto_leaves_the_choice(caller: Server) -> None:
    for choice in ("none", "auto"):
        body = {"messages": user("no"), "tools": TOOLS, "tool_choice": choice, "temperature": 0}
        answer = caller.post(CHAT, body).json()
        assert answer["choices"][0]["message"]["content"] == "I will not.", answer
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_strict_tool_binds_the_arguments_once_the_model_calls(caller: Server) -> None:
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    body = {"messages": user("please"), "tools": strict, "temperature": 0}
    [call] = caller.post(CHAT, body).json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"k": "你"}
    # The model's own arguments have a key that the schema forbids: the masks leave it no choice.
    other = {
        "type": "object",
        "properties": {"n": {"enum": [7]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    strict[0]["function"]["parameters"] = other
    answer = caller.post(CHAT, {**body, "parallel_tool_calls": False}).json()
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"n": 7}
    prose = caller.post(CHAT, {**body, "messages": user("no")}).json()["choices"][0]["message"]
    assert prose["content"] == "I will not."


def test_a_format_beside_tools_binds_the_answer_and_leaves_the_call(caller: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7]}}}
    body = {"tools": TOOLS, "temperature": 0, "response_format": wanted, "parallel_tool_calls": False}
    choice = caller.post(CHAT, {**body, "messages": user("please")}).json()["choices"][0]
    [call] = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"k": "你"}
    # "I will not." is neither a call nor a seven.
    seven = caller.post(CHAT, {**body, "messages": user("no"), "logit_bias": {"55": 50}}).json()["choices"][0]
    assert (seven["message"]["content"], seven["finish_reason"]) == ("7", "stop")
    forced = caller.post(CHAT, {**body, "messages": user("no"), "tool_choice": "required"}).json()
    assert forced["choices"][0]["finish_reason"] == "tool_calls"
    other = {"messages": user("no"), "tools": TOOLS, "guided_regex": "a"}
    refused = caller.post(CHAT, other).json()["error"]
    assert (refused["param"], refused["code"]) == ("guided_regex", "unsupported")


@pytest.mark.slow
def test_a_tool_is_never_dropped() -> None:
    with fake_server(
        reply="x", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}", context=512
    ) as plain:
        response = plain.post(CHAT, {"messages": user(), "tools": TOOLS})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools"
        call = {"id": "1", "type": "function", "function": {"name": "lost", "arguments": "{}"}}
        turns = [*user(), {"role": "assistant", "content": "a", "tool_calls": [call]}, *user()]
        response = plain.post(CHAT, {"messages": turns})
        assert "no place for a call of 'lost'" in response.json()["error"]["message"]
        assert (
            plain.post(CHAT, {"messages": user(), "tools": TOOLS, "tool_choice": "none"}).status_code == 200
        )
