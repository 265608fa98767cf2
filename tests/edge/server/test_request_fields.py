"""Every field has its bound, and an error names both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_server import Server, error, fake_server, user


@pytest.fixture(scope="module")
def spelling() -> Iterator[Server]:
    """Answers everything with one text, quickly."""
    with fake_server(reply="你好, world! <end>", context=256, slots=4) as server:
        yield server


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ({"prompt": "a", "temperature": "0.5"}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": 1e300}, "temperature"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias"),
        ({"prompt": "a", "max_new_tokens": 3}, "max_new_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
    ],
)
def test_bad_values_are_named(spelling: Server, body: dict[str, Any], param: str) -> None:
    response = spelling.post("/generate", body)
    assert response.status_code == 400
    assert (error(response)["param"] or "").split(".")[0] == param


@pytest.mark.parametrize(
    ("body", "param", "bound"),
    [
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": "x" * 257}, "stop", "at most 256"),
        ({"stop": ["a", "x" * 257]}, "stop.1", "at most 256"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"max_tokens": 1_000_001}, "max_tokens", "1000000"),
        ({"max_tokens": 10**20}, "max_tokens", "1000000"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "greater than or equal to 1"),
        ({"temperature": 2.1}, "temperature", "2"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "259"),
        ({"stop_token_ids": [9999]}, "stop_token_ids", "259"),
        ({"timeout": 86401}, "timeout", "86400"),
        ({"messages": [{"role": "user", "content": "x"}] * 2049}, "messages", "at most 2048"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        ({"tool_choice": "sometimes"}, "tool_choice", "'required'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools", "at most 128"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 65536]}}}},
            "response_format.json_schema.schema",
            "65536",
        ),
    ],
)
def test_every_limit_names_its_field_and_its_bound(
    spelling: Server, body: dict[str, Any], param: str, bound: str
) -> None:
    response = spelling.post("/v1/chat/completions", {"messages": user(), **body})
    assert response.status_code == 400
    failure = error(response)
    assert failure["param"] == param
    assert bound in failure["message"]
