"""OpenAI's chat completions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_server import CHAT, Server, error, events, fake_server, user

EMOJI = "你好👩\u200d🚀🇨🇳"


@pytest.fixture(scope="module")
def emoji() -> Iterator[Server]:
    with fake_server(reply=EMOJI, context=256) as server:
        yield server


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    """Never stops by itself within its context; 20 ms a step."""
    with fake_server(
        reply="x" * 5000, context=4096, slots=2, step_s=0.02, token_s=0.001, max_queue=3
    ) as server:
        yield server


def test_chat_completion(spelling: Server) -> None:
    body = spelling.post(CHAT, {"model": "fake", "messages": user(), "temperature": 0}).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "你好, world! <end>"}
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_s14_the_usage_chunk_comes_only_when_asked(spelling: Server) -> None:
    body = {"messages": user(), "stream": True, "temperature": 0}
    plain = events(spelling.post(CHAT, body))
    asked = events(spelling.post(CHAT, {**body, "stream_options": {"include_usage": True}}))
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in plain)
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["completion_tokens"] > 0
    for chunks in (plain, asked[:-1]):
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "你好, world! <end>"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("limit", range(1, 21, 3))
def test_s1_a_stream_joins_to_the_whole_wherever_it_is_cut(emoji: Server, limit: int) -> None:
    body = {"messages": user(), "temperature": 0, "max_tokens": limit}
    whole = emoji.post(CHAT, body).json()["choices"][0]["message"]["content"]
    streamed = events(emoji.post(CHAT, {**body, "stream": True}))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in streamed) == whole
    assert whole.rstrip("\ufffd") == EMOJI.encode()[:limit].decode("utf-8", "ignore")


@pytest.mark.parametrize(
    ("stop", "want"), [("好👩", "你"), (["x", "\u200d"], "你好👩"), (EMOJI + "!", EMOJI)]
)
def test_s2_a_stop_that_straddles_tokens_is_never_shown(emoji: Server, stop: Any, want: str) -> None:
    body = {"messages": user(), "temperature": 0, "stop": stop}
    assert emoji.post(CHAT, body).json()["choices"][0]["message"]["content"] == want
    streamed = events(emoji.post(CHAT, {**body, "stream": True}))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in streamed) == want
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_s7_a_long_system_prompt_is_read_once(emoji: Server) -> None:
    system = {"role": "system", "content": "s" * 150}
    used = [
        emoji.post(CHAT, {"messages": [system, *user(text)]}).json()["usage"]["prompt_tokens_details"]
        for text in ("one?", "two?")
    ]
    # Other tests' prompts begin with the same "<".
    assert used[0]["cached_tokens"] <= 1
    assert used[1]["cached_tokens"] == len("<system>" + "s" * 150 + "<user>")


@pytest.mark.slow
def test_s13_both_names_of_the_limit_and_a_sane_default(slow: Server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = slow.post(CHAT, {"messages": user(), "temperature": 0, name: 4}).json()
        assert body["usage"]["completion_tokens"] == 4
        assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow
def test_s13_without_a_limit_the_context_is_the_limit() -> None:
    with fake_server(reply="y" * 500, context=128) as server:
        body = server.post(CHAT, {"messages": user(), "temperature": 0}).json()
        assert body["usage"]["total_tokens"] == 128
        assert body["choices"][0]["finish_reason"] == "length"


def test_s15_logprobs_of_both_shapes(spelling: Server) -> None:
    chat = spelling.post(CHAT, {"messages": user(), "logprobs": True, "temperature": 0}).json()
    choice = chat["choices"][0]
    joined = b"".join(bytes(row["bytes"]) for row in choice["logprobs"]["content"])
    assert joined.decode() == choice["message"]["content"]
    assert all(row["top_logprobs"] == [] and row["logprob"] <= 0 for row in choice["logprobs"]["content"])
    legacy = spelling.post("/v1/completions", {"prompt": "x", "logprobs": 2, "temperature": 0}).json()
    shape = legacy["choices"][0]["logprobs"]
    count = len(shape["tokens"])
    assert count == len(shape["token_logprobs"]) == len(shape["top_logprobs"]) == len(shape["text_offset"])
    assert all(len(top) <= 2 for top in shape["top_logprobs"])
    assert spelling.post(CHAT, {"messages": user(), "top_logprobs": 2}).status_code == 400


def test_s19_content_parts_and_null(spelling: Server) -> None:
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    joined = spelling.post(CHAT, {"messages": user(parts)}).json()
    assert joined["usage"]["prompt_tokens"] == len("<user>hello<assistant>")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = [{"role": "assistant", "content": None, "tool_calls": [call]}, *user()]
    assert spelling.post(CHAT, {"messages": calls}).status_code == 200
    for messages in (user(None), user([{"type": "image_url"}]), user(5), "x", [], None, [{"role": "user"}]):
        assert spelling.post(CHAT, {"messages": messages}).status_code == 400, messages


def test_s8_a_templates_own_exception_is_a_400_with_its_text(spelling: Server) -> None:
    response = spelling.post(CHAT, {"messages": [*user(), {"role": "assistant", "content": "x"}]})
    assert response.status_code == 400
    assert "the last turn must be yours" in error(response)["message"]


def test_what_cannot_be_honoured_is_refused(spelling: Server) -> None:
    for extra in (
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
        {"n": 17},
        {"functions": [{"name": "f"}]},
        {"stream_options": {"include_usage": True}},
    ):
        assert spelling.post(CHAT, {"messages": user(), **extra}).status_code == 400, extra
    for extra in ({"user": "u"}, {"response_format": {"type": "text"}}, {"tools": []}):
        assert spelling.post(CHAT, {"messages": user(), **extra}).status_code == 200, extra
    assert spelling.post(CHAT, {"model": "/etc/passwd", "messages": user()}).status_code == 404


def test_structured_output_over_http(spelling: Server) -> None:
    # The model wants to say something else; the masks leave it no choice.
    schema = {"type": "object", "properties": {"k": {"enum": [7]}}, "required": ["k"]}
    asked = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}},
    }
    body = spelling.post(CHAT, {"messages": user(), "response_format": asked}).json()
    assert json.loads(body["choices"][0]["message"]["content"]) == {"k": 7}
    assert body["choices"][0]["finish_reason"] == "stop"
    text = spelling.post("/generate", {"prompt": "x", "regex": "[0-9]{4}-[a-f]{2}"}).json()["generate_text"]
    assert re.fullmatch("[0-9]{4}-[a-f]{2}", text)
    both = spelling.post("/generate", {"prompt": "x", "regex": "a", "json_schema": True})
    assert both.status_code == 400
    deep = spelling.post("/generate", {"prompt": "x", "regex": "(" * 50_000 + ")" * 50_000})
    assert deep.status_code == 400
    assert spelling.get("/ready").json() == {"status": "ready", "model": "fake"}


def test_s5_a_prompt_that_does_not_fit(spelling: Server) -> None:
    response = spelling.post(CHAT, {"messages": user("word " * 300)})
    assert response.status_code == 400
    assert error(response)["code"] == "context_length_exceeded"
    tokens = len("<user>" + "word " * 300 + "<assistant>")
    assert f"{tokens} tokens" in error(response)["message"]
    assert "256" in error(response)["message"]
    streamed = spelling.post(CHAT, {"messages": user("word " * 300), "stream": True})
    assert streamed.status_code == 400


@pytest.mark.slow
def test_s9_a_thought_that_the_template_opened_is_split_off() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    with fake_server(reply="a</think>\n\nb", chat_template=template) as server:
        whole = server.post(CHAT, {"messages": user(), "temperature": 0}).json()["choices"][0]["message"]
        assert (whole["reasoning_content"], whole["content"]) == ("a", "b")
        rows = events(server.post(CHAT, {"messages": user(), "temperature": 0, "stream": True}))
        deltas = [row["choices"][0]["delta"] for row in rows]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "a"
        assert "".join(delta.get("content", "") for delta in deltas) == "b"


@pytest.mark.slow
def test_several_choices_differ_by_seed_and_count_the_prompt_once(server: Server) -> None:
    body = {"model": "chance", "messages": user(), "n": 3, "seed": 5, "max_tokens": 20, "ignore_eos": True}
    whole = server.post(CHAT, body).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole["usage"]["completion_tokens"] == 60
    one = server.post(CHAT, {**body, "n": 1, "seed": 6}).json()
    assert one["choices"][0]["message"]["content"] == texts[1]
    assert whole["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    streamed = ["", "", ""]
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    rows = events(server.post(CHAT, asked))
    for row in rows:
        for choice in row["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts
    assert rows[-1]["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize(
    ("extra", "want"),
    [
        ({"guided_choice": ["yes", "no"]}, ("yes", "no")),
        ({"guided_regex": "[ab]{3}"}, None),
        ({"guided_json": {"enum": [7]}}, ("7",)),
        ({"guided_grammar": 'start: "a" | "b"'}, ("a", "b")),
    ],
)
def test_vllms_names_for_structured_output(server: Server, extra: dict[str, Any], want: Any) -> None:
    text = server.post(CHAT, {"messages": user(), **extra}).json()["choices"][0]["message"]["content"]
    assert text in want if want else len(text) == 3 and set(text) <= set("ab")
    both = {"messages": user(), **extra, "response_format": {"type": "json_object"}}
    assert server.post(CHAT, both).status_code == 400


def test_a_thought_is_switched_off_and_on_by_the_request(server: Server) -> None:
    def ask(**extra: Any) -> dict[str, Any]:
        body = {"model": "thinker", "messages": user(), "temperature": 0, **extra}
        message: dict[str, Any] = server.post(CHAT, body).json()["choices"][0]["message"]
        return message

    assert (ask()["reasoning_content"], ask()["content"]) == ("well", "seven")
    usage = server.post(CHAT, {"model": "thinker", "messages": user(), "n": 2}).json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 2 * len("well</think>")}
    plain = server.post(CHAT, {"model": "fake", "messages": user()}).json()["usage"]
    assert plain["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert ask(reasoning_format="none")["content"] == "well</think>\n\nseven"
    for off in ({"enable_thinking": False}, {"reasoning_effort": "none"}):
        assert ask(**off)["content"] == "well</think>\n\nseven", off
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    assert ask(**kwargs)["content"] == "well</think>\n\nseven"
    cut = ask(thinking_budget=2)
    assert cut["reasoning_content"] == "we"
    plain = server.post(CHAT, {"model": "fake", "messages": user(), "enable_thinking": True})
    assert plain.json()["error"]["param"] == "enable_thinking"
    taken = {"chat_template_kwargs": {"messages": []}}
    assert server.post(CHAT, {"messages": user(), **taken}).status_code == 400


def test_a_schema_leaves_the_thought_alone(server: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7]}}}
    body = {"model": "thinker", "messages": user(), "temperature": 0, "response_format": wanted}
    message = server.post(CHAT, body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("well", "7")


def test_the_models(server: Server) -> None:
    assert [row["id"] for row in server.get("/v1/models").json()["data"]] == ["fake", "chance", "thinker"]
    assert server.get("/v1/models/thinker").json()["id"] == "thinker"
    assert server.get("/v1/models/nobody").status_code == 404


def test_u23_a_choice_among_some_of_the_tools(server: Server) -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("f", "g")]

    def ask(mode: str, *names: str) -> Any:
        chosen = [{"type": "function", "function": {"name": name}} for name in names]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": chosen}}
        body = {"messages": user(), "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
        return server.post(CHAT, body)

    [call] = ask("required", "g").json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "g"
    assert ask("auto", "f", "g").status_code == 200
    assert error(ask("auto", "h"))["param"] == "tool_choice"
    assert ask("auto").status_code == 400
    assert ask("none", "f").status_code == 400
