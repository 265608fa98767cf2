"""OpenAI's own client: chat, streams, tools, parsed output, logprobs, completions, embeddings, responses."""

from __future__ import annotations

import json

import openai
import pytest
from openai import OpenAI

from tests.conformance.conftest import REPLY

CURRENT = int(openai.__version__.split(".")[0]) > 1
MAGIC = {
    "type": "function",
    "function": {
        "name": "magic_function",
        "description": "Apply a magic function.",
        "parameters": {
            "type": "object",
            "properties": {"input": {"type": "integer"}},
            "required": ["input"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "thinker"]
    assert client.models.retrieve("fake").owned_by == "edge"


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=user("x"))
    assert answer.choices[0].message.content == REPLY
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_with_usage(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=user("x"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
    assert chunks[-1].usage.completion_tokens > 0


def test_several_choices(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=user("x"), n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="fake", messages=user("x"), n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [REPLY] * 3


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "magic_function"}}]
)
def test_tools(client: OpenAI, choice: object) -> None:
    asked = {"model": "fake", "messages": user("magic_function(3)"), "tools": [MAGIC], "tool_choice": choice}
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    [call] = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("magic_function", {"input": 3})
    name, arguments = "", ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        for part in chunk.choices[0].delta.tool_calls or []:
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, json.loads(arguments)) == ("magic_function", {"input": 3})


def test_a_whole_round_with_a_tool(client: OpenAI) -> None:
    first = client.chat.completions.create(model="fake", messages=user("magic_function(3)"), tools=[MAGIC])
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5"}
    messages = [*user("magic_function(3)"), message, result]
    second = client.chat.completions.create(model="fake", messages=messages, tools=[MAGIC])
    assert second.choices[0].message.content == "That is all I know."


def test_parsed_output(client: OpenAI) -> None:
    from pydantic import BaseModel

    class Joke(BaseModel):
        setup: str
        punchline: str

    parse = client.chat.completions.parse if CURRENT else client.beta.chat.completions.parse
    answer = parse(model="fake", messages=user("Tell a joke about cats"), response_format=Joke)
    assert answer.choices[0].message.parsed.punchline == "To paws the program."


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=user("x"), logprobs=True, top_logprobs=2)
    rows = answer.choices[0].logprobs.content
    assert b"".join(bytes(row.bytes) for row in rows).decode() == REPLY
    assert all(len(row.top_logprobs) == 2 for row in rows)


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["a", "b"], n=2, echo=True)
    assert [choice.text for choice in answer.choices] == ["a" + REPLY] * 2 + ["b" + REPLY] * 2
    text = "".join(
        c.choices[0].text for c in client.completions.create(model="fake", prompt="a", stream=True)
    )
    assert text == REPLY


def test_embeddings(client: OpenAI) -> None:
    # The client asks for base64 of its own accord and decodes it.
    answer = client.embeddings.create(model="fake", input=["one", "two"])
    assert [row.index for row in answer.data] == [0, 1]
    assert sum(v * v for v in answer.data[0].embedding) == pytest.approx(1.0, abs=1e-5)
    plain = client.embeddings.create(model="fake", input=["one"], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(answer.data[0].embedding)


def test_reasoning(client: OpenAI) -> None:
    message = client.chat.completions.create(model="thinker", messages=user("x")).choices[0].message
    assert (message.reasoning_content, message.content) == ("Let me see.", "Forty-two.")


def test_responses(client: OpenAI) -> None:
    answer = client.responses.create(model="fake", input="x", store=False)
    assert (answer.status, answer.output_text) == ("completed", REPLY)
    with client.responses.create(model="fake", input="x", stream=True) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_responses_with_a_thought_and_the_streaming_helper(client: OpenAI) -> None:
    with client.responses.stream(model="thinker", input="x") as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "Forty-two."
    assert final.output[0].type == "reasoning"


def test_responses_with_tools(client: OpenAI) -> None:
    flat = {"type": "function", **MAGIC["function"]}
    first = client.responses.create(model="fake", input="magic_function(3)", tools=[flat])
    [call] = first.output
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "magic_function",
        {"input": 3},
    )
    second = client.responses.create(
        model="fake",
        tools=[flat],
        input=[
            {"role": "user", "content": "magic_function(3)"},
            {
                "type": "function_call",
                "call_id": call.call_id,
                "name": call.name,
                "arguments": call.arguments,
            },
            {"type": "function_call_output", "call_id": call.call_id, "output": "5"},
        ],
    )
    assert second.output_text == "That is all I know."


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=user("x"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake", messages=user("x"), temperature=9)
    assert bad.value.param == "temperature"
