"""Anthropic's client: messages, its stream helper (which checks the order of events), tools, counts."""

from __future__ import annotations

import anthropic
import pytest

from tests.conformance.conftest import REPLY

MAGIC = {
    "name": "magic_function",
    "description": "Apply a magic function.",
    "input_schema": {"type": "object", "properties": {"input": {"type": "integer"}}, "required": ["input"]},
}


@pytest.fixture
def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_message(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="fake", max_tokens=100, messages=user("x"), system="Be kind.")
    assert [block.text for block in answer.content] == [REPLY]
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 0
    short = client.messages.create(model="fake", max_tokens=5, messages=user("x"))
    assert short.stop_reason == "max_tokens"
    stopped = client.messages.create(
        model="fake", max_tokens=99, messages=user("x"), stop_sequences=["conch"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "conch")


def test_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="fake", max_tokens=100, messages=user("x")) as stream:
        assert "".join(stream.text_stream) == REPLY
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    counted = client.messages.count_tokens(model="fake", messages=user("x"))
    usage = final.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


def test_thinking(client: anthropic.Anthropic) -> None:
    asked = {"model": "thinker", "messages": user("x")}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    answer = client.messages.create(**asked, max_tokens=2000, thinking=thinking)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    with client.messages.stream(**asked, max_tokens=2000, thinking=thinking) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_tools(client: anthropic.Anthropic) -> None:
    asked = {"model": "fake", "max_tokens": 500, "tools": [MAGIC]}
    answer = client.messages.create(**asked, messages=user("magic_function(3)"), tool_choice={"type": "any"})
    assert answer.stop_reason == "tool_use"
    [block] = answer.content
    assert (block.name, block.input) == ("magic_function", {"input": 3})
    with client.messages.stream(**asked, messages=user("magic_function(3)")) as stream:
        [streamed] = stream.get_final_message().content
    assert (streamed.name, streamed.input) == ("magic_function", {"input": 3})
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "5"}
    messages = [
        *user("magic_function(3)"),
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(**asked, messages=messages).content[0].text == "That is all I know."


def test_errors_are_the_clients_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nobody", max_tokens=9, messages=user("x"))
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(model="fake", max_tokens=9, messages=user("x"), extra_body={"temperature": 9})
