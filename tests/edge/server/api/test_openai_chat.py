"""OpenAI's routes beyond the plain answer: choices, lists of prompts, vectors, thoughts, responses."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.fake_server import Server, fake_server

CHAT = "/v1/chat/completions"
REPLY = "你好, world!"
THINKER = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    common = {"context": 256, "slots": 4}
    models = {
        "fake": {**common, "reply": REPLY},
        "chance": common,
        "thinker": {**common, "reply": "well</think>\n\nseven", "chat_template": THINKER},
    }
    with fake_server(models=models) as started:
        yield started


def user(text: Any = "hi") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def chunks(text: str) -> list[dict[str, Any]]:
    return [json.loads(row[6:]) for row in text.split("\n\n") if row.startswith("data: {")]


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
    rows = chunks(server.post(CHAT, asked).text)
    for row in rows:
        for choice in row["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts
    assert rows[-1]["usage"]["completion_tokens"] == 60


def test_lists_of_prompts_in_the_older_interface(server: Server) -> None:
    url = "/v1/completions"
    body = {"prompt": ["ab", "cd"], "temperature": 0, "echo": True}
    whole = server.post(url, body).json()
    assert [c["text"] for c in whole["choices"]] == ["ab" + REPLY, "cd" + REPLY]
    assert whole["usage"]["prompt_tokens"] == 4
    texts = {0: "", 1: ""}
    for row in chunks(server.post(url, {**body, "stream": True}).text):
        for choice in row["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "ab" + REPLY, 1: "cd" + REPLY}
    ids = server.post(url, {"prompt": [[97, 98], [99]], "echo": True}).json()
    assert [c["text"][:2] for c in ids["choices"]] == ["ab", "c你"]
    assert server.post(url, {"prompt": "x", "echo": True, "logprobs": 1}).status_code == 400
    assert server.post(url, {"prompt": ["x"] * 33, "n": 2}).json()["error"]["param"] == "n"
    assert server.post(url, {"prompt": [[1, 999]]}).status_code == 400


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


def test_vectors(server: Server) -> None:
    url = "/v1/embeddings"
    whole = server.post(url, {"input": ["one", "two", [97, 98]][:2], "model": "fake"}).json()
    vectors = [row["embedding"] for row in whole["data"]]
    assert [row["index"] for row in whole["data"]] == [0, 1]
    assert whole["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert np.allclose([np.linalg.norm(v) for v in vectors], 1)
    packed = server.post(url, {"input": "one", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(packed), "<f4"), vectors[0])
    ids = server.post(url, {"input": [111, 110, 101]}).json()["data"][0]["embedding"]
    assert np.allclose(ids, vectors[0])
    for bad in ({"input": ""}, {"input": []}, {"input": "x", "dimensions": 4}, {"input": "y" * 300}):
        assert server.post(url, bad).status_code == 400, bad


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


def test_responses_are_stateless_and_in_order(server: Server) -> None:
    url = "/v1/responses"
    whole = server.post(url, {"model": "thinker", "input": "hi"}).json()
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message"]
    assert whole["output"][1]["content"][0]["text"] == "seven"
    assert whole["status"] == "completed"
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": len("well</think>")}
    rows = chunks_of_events(server.post(url, {"model": "thinker", "input": "hi", "stream": True}).text)
    kinds = [row["type"] for row in rows]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    assert [row["sequence_number"] for row in rows] == list(range(len(rows)))
    assert "".join(r["delta"] for r in rows if r["type"] == "response.output_text.delta") == "seven"
    assert rows[-1]["response"]["output"][1]["content"] == whole["output"][1]["content"]
    short = server.post(url, {"input": "hi", "max_output_tokens": 3}).json()
    assert short["incomplete_details"] == {"reason": "max_output_tokens"}
    for name, value in (("previous_response_id", "resp_1"), ("store", True), ("background", True)):
        refused = server.post(url, {"input": "hi", name: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


def chunks_of_events(text: str) -> list[dict[str, Any]]:
    rows = []
    for block in text.strip().split("\n\n"):
        kind, data = block.split("\n")
        row = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {row['type']}"
        rows.append(row)
    return rows


def test_tokens_and_back(server: Server) -> None:
    given = server.post("/tokenize", {"text": "你a"}).json()
    assert (given["tokens"], given["count"]) == ([228, 189, 160, 97], 4)
    assert server.post("/detokenize", {"tokens": given["tokens"]}).json()["text"] == "你a"
    turned = server.post("/tokenize", {"messages": user("hi")}).json()
    assert bytes(turned["tokens"]).decode() == "<user>hi<assistant>"
    assert server.post("/detokenize", {"tokens": [260]}).status_code == 400
    assert server.post("/tokenize", {}).status_code == 400


def test_the_models(server: Server) -> None:
    assert [row["id"] for row in server.get("/v1/models").json()["data"]] == ["fake", "chance", "thinker"]
    assert server.get("/v1/models/thinker").json()["id"] == "thinker"
    assert server.get("/v1/models/nobody").status_code == 404
