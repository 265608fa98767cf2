"""A last message of the assistant is continued, on every API family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_server import CHAT, Server, error, fake_server, user

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Takes the reasoning out of an answer and writes it back between its tags, as Qwen 3 does, and trims.
SPLITS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}<think>{{ parts[0] if parts | length > 1 }}</think>"
    "{{ parts[-1] | trim }}{% else %}{{ m.content | trim }}{% endif %}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
DROPS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}>"
HEAD = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TURNS = [*user(), {"role": "assistant", "content": "Once upon "}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    common = {"context": 512, "slots": 4, "batch": 128}
    models = {
        # A prompt that ends where the text was left is answered by its rest.
        "fake": {**common, "chat_template": CHATML, "reply": "new", "script": [["Once upon ", "a time"]]},
        "splits": {**common, "chat_template": SPLITS, "reply": "on</think>\n\nseven"},
        "drops": {**common, "chat_template": DROPS, "reply": "x"},
        "raises": {**common, "reply": "x"},
    }
    with fake_server(models=models) as started:
        yield started


def prompt_of(server: Server, messages: list[dict[str, Any]], model: str = "fake") -> str:
    answer = server.post("/tokenize", {"model": model, "messages": messages}).json()
    return bytes(answer["tokens"]).decode("utf-8")


@pytest.mark.slow
def test_the_prompt_ends_where_the_answer_was_left(server: Server) -> None:
    assert prompt_of(server, TURNS) == HEAD + "Once upon "
    assert prompt_of(server, [*user(), {"role": "assistant", "content": ""}]) == HEAD
    assert prompt_of(server, user()) == HEAD


def test_every_family_answers_with_the_rest(server: Server) -> None:
    chat = server.post(CHAT, {"model": "fake", "messages": TURNS, "temperature": 0}).json()
    assert chat["choices"][0]["message"]["content"] == "a time"
    assert chat["usage"]["prompt_tokens"] == len(HEAD + "Once upon ")
    named = {"continue_final_message": True, "add_generation_prompt": False}
    again = server.post(CHAT, {"model": "fake", "messages": TURNS, "temperature": 0, **named}).json()
    assert again["choices"][0]["message"] == chat["choices"][0]["message"]
    anthropic = {"model": "fake", "max_tokens": 99, "messages": TURNS, "temperature": 0}
    answer = server.post("/v1/messages", anthropic).json()
    assert answer["content"] == [{"type": "text", "text": "a time"}]
    assert answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == len(HEAD) + 10
    ollama = {"model": "fake", "messages": TURNS, "stream": False, "options": {"temperature": 0}}
    row = server.post("/api/chat", ollama).json()
    assert (row["message"]["content"], row["prompt_eval_count"]) == ("a time", len(HEAD) + 10)
    responses = server.post("/v1/responses", {"model": "fake", "input": TURNS, "temperature": 0}).json()
    assert responses["usage"]["input_tokens"] == len(HEAD) + 10
    ours = server.post("/generate", {"model": "fake", "messages": TURNS}).json()
    assert (ours["generate_text"], ours["usage"]["prompt_tokens"]) == ("a time", len(HEAD) + 10)


def test_a_new_turn_is_opened_on_request(server: Server) -> None:
    body = {"model": "fake", "messages": TURNS, "continue_final_message": False}
    used = server.post(CHAT, body).json()["usage"]["prompt_tokens"]
    assert used == len(HEAD + "Once upon <|im_end|>\n<|im_start|>assistant\n")
    body = {"model": "fake", "messages": TURNS, "add_generation_prompt": True}
    assert server.post(CHAT, body).json()["usage"]["prompt_tokens"] == used


@pytest.mark.parametrize(
    ("model", "messages", "extra", "param"),
    [
        ("fake", user(), {"continue_final_message": True}, "continue_final_message"),
        ("fake", user(), {"add_generation_prompt": False}, "continue_final_message"),
        (
            "fake",
            TURNS,
            {"add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt",
        ),
        pytest.param("drops", TURNS, {}, "messages", marks=pytest.mark.slow),
        pytest.param("raises", TURNS, {}, "messages", marks=pytest.mark.slow),
        ("fake", [*user("\ufdd0"), TURNS[1]], {}, "messages"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    server: Server, model: str, messages: Any, extra: dict[str, Any], param: str
) -> None:
    response = server.post(CHAT, {"model": model, "messages": messages, **extra})
    assert (response.status_code, error(response)["param"]) == (400, param)


@pytest.mark.parametrize(
    ("begun", "prompt", "reasoning", "content"),
    [
        ("The ", "[user]hi[end][assistant]<think></think>The ", None, "on</think>\n\nseven"),
        (
            "<think>well</think>The",
            "[user]hi[end][assistant]<think><think>well</think>The",
            None,
            "on</think>\n\nseven",
        ),
        ("<think>we", "[user]hi[end][assistant]<think></think><think>we", "on", "seven"),
        ("", "[user]hi[end][assistant]<think>", "on", "seven"),
    ],
)
def test_reasoning_that_was_begun_goes_on(
    server: Server, begun: str, prompt: str, reasoning: str | None, content: str
) -> None:
    messages = [*user(), {"role": "assistant", "content": begun}]
    assert prompt_of(server, messages, "splits") == prompt
    message = server.post(CHAT, {"model": "splits", "messages": messages, "temperature": 0}).json()
    message = message["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (reasoning, content)
