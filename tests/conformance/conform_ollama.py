"""Ollama's client: chat, generate, embed, and what it asks about models."""

from __future__ import annotations

import ollama
import pytest

from tests.conformance.conftest import REPLY


@pytest.fixture
def client(url: str) -> ollama.Client:
    return ollama.Client(host=url)


def test_chat(client: ollama.Client) -> None:
    answer = client.chat("fake", [{"role": "user", "content": "x"}], keep_alive="5m")
    assert answer.message.content == REPLY
    assert answer.done_reason == "stop"
    assert answer.eval_count > 0
    assert answer.total_duration > 0
    parts = list(client.chat("fake:latest", [{"role": "user", "content": "x"}], stream=True))
    assert "".join(part.message.content for part in parts) == REPLY
    assert parts[-1].done


def test_generate(client: ollama.Client) -> None:
    assert client.generate("fake", "x", options={"temperature": 0, "num_predict": 5}).done_reason == "length"
    assert "".join(part.response for part in client.generate("fake", "x", stream=True)) == REPLY
    assert client.generate("fake").done_reason == "load"


def test_tools(client: ollama.Client) -> None:
    def magic_function(input: int) -> int:
        """Apply a magic function.

        Args:
            input: a number
        """
        return input + 2

    messages = [{"role": "user", "content": "magic_function(3)"}]
    answer = client.chat("fake", messages, tools=[magic_function])
    [call] = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("magic_function", {"input": 3})
    messages += [answer.message, {"role": "tool", "tool_name": "magic_function", "content": "5"}]
    assert client.chat("fake", messages, tools=[magic_function]).message.content == "That is all I know."


def test_format(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"setup": {"type": "string"}}, "required": ["setup"]}
    messages = [{"role": "user", "content": "A joke about cats"}]
    assert client.chat("fake", messages, format=schema).message.content.startswith('{"setup"')


def test_thinking(client: ollama.Client) -> None:
    answer = client.chat("thinker", [{"role": "user", "content": "x"}], think=True)
    assert (answer.message.thinking, answer.message.content) == ("Let me see.", "Forty-two.")


def test_embeddings(client: ollama.Client) -> None:
    assert len(client.embed("fake", ["one", "two"]).embeddings) == 2
    assert len(client.embeddings("fake", "one").embedding) == 16


def test_models(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == ["fake", "thinker"]
    assert "fake" in [model.model for model in client.ps().models]
    shown = client.show("fake")
    assert {"completion", "tools", "embedding"} <= set(shown.capabilities)


def test_errors_are_the_clients_own(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="is not served here") as caught:
        client.chat("nobody", [{"role": "user", "content": "x"}])
    assert caught.value.status_code == 404
