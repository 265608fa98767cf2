"""litellm, in three of its dialects, against the same server."""

from __future__ import annotations

import litellm
import pytest

from tests.conformance.conftest import REPLY

litellm.suppress_debug_info = True
DIALECTS = [("openai/fake", "/v1"), ("ollama_chat/fake", ""), ("anthropic/fake", "")]


def asked(url: str, model: str, path: str) -> dict[str, object]:
    return {"model": model, "api_base": url + path, "api_key": "none", "max_tokens": 100}


@pytest.mark.parametrize(("model", "path"), DIALECTS)
def test_completion(url: str, model: str, path: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    answer = litellm.completion(messages=messages, **asked(url, model, path))
    assert answer.choices[0].message.content == REPLY
    stream = litellm.completion(messages=messages, stream=True, **asked(url, model, path))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == REPLY


@pytest.mark.parametrize(("model", "path"), DIALECTS)
def test_tools(url: str, model: str, path: str) -> None:
    parameters = {"type": "object", "properties": {"input": {"type": "integer"}}, "required": ["input"]}
    tool = {"type": "function", "function": {"name": "magic_function", "parameters": parameters}}
    messages = [{"role": "user", "content": "magic_function(3)"}]
    answer = litellm.completion(messages=messages, tools=[tool], **asked(url, model, path))
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "magic_function"
    assert '"input": 3' in call.function.arguments


def test_embedding(url: str) -> None:
    answer = litellm.embedding("openai/fake", input=["one"], api_base=f"{url}/v1", api_key="none")
    assert len(answer.data[0]["embedding"]) == 16
