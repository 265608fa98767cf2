"""Tool calls: the dialects of templates, read from streams of any chunking, and forced by grammars."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import RequestError
from edge.reasoning import ReasoningSplitter
from edge.server.conversation import Reader
from edge.server.tool_dialects import DEEPSEEK, HERMES, LLAMA3, Dialect, Tool, dialect_of
from edge.server.tool_parser import CallReader
from tests.support.fake_server import Server, fake_server

CHAT = "/v1/chat/completions"
QWEN = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
# As DeepSeek's distills have it: calls and results have a place, definitions have none.
DISTILL = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ ns.system }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}{% for tool in m['tool_calls'] %}"
    "{{ '<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' "
    "+ tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] "
    "+ '\\n```<｜tool▁call▁end｜>' }}"
    "{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is not none %}<｜Assistant｜>{{ m['content'] }}"
    "{% endif %}"
    "{% if m['role'] == 'tool' %}<｜tool▁output▁begin｜>{{ m['content'] }}<｜tool▁output▁end｜>{% endif %}"
    "{% endfor %}<｜Assistant｜>"
)
LLAMA = (
    "{% if tools %}<|start_header_id|>system{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", "parameters": '
    "{{ c.function.arguments | tojson }}}{% endfor %}{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>"
)
ANSWERS = {
    "hermes": ('<tool_call>\n{"name": "f", "arguments": {"k": "你"}}\n</tool_call>', QWEN),
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
        '```json\n{"k": "你"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        DISTILL,
    ),
    "llama3": ('{"name": "f", "parameters": {"k": "你"}}', LLAMA),
}
SCHEMA = {
    "type": "object",
    "properties": {"k": {"type": "string", "maxLength": 3}},
    "required": ["k"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]


def user(text: str = "hi") -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def read(dialect: Dialect, text: str, size: int, **given: Any) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(dialect, given.pop("tools", [Tool("f"), Tool("get")]), **given)
    shown, calls = "", []
    for i in range(0, len(text), size):
        more, new = reader.push(text[i : i + size])
        shown, calls = shown + more, calls + new
    more, new = reader.push("", last=True)
    return shown + more, [(call.name, json.loads(call.arguments)) for call in calls + new]


F = ("f", {"k": "你"})
BARE = '{"name": "f", "arguments": {"k": "你"}}'
HARD = {"k": 'a "}" {{b}} \\', "n": {"é": [{}, {"x": "</tool"}]}}
NESTED = '{"name": "f", "%s": ' + json.dumps(HARD, ensure_ascii=False) + "}"
DEEP = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n%s\n```<｜tool▁call▁end｜>"


@pytest.mark.parametrize(
    ("dialect", "text", "want"),
    [
        (HERMES, ANSWERS["hermes"][0], ("", [F])),
        (HERMES, "Sure.\n\n" + ANSWERS["hermes"][0] + "\n" + ANSWERS["hermes"][0] + "\n", ("Sure.", [F, F])),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"k": "你"}}', ("", [F])),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"k\\": \\"你\\"}"}</tool_call>', ("", [F])),
        (HERMES, "<tool_call>{broken</tool_call> x", ("<tool_call>{broken</tool_call> x", [])),
        (HERMES, "1 < 2 and <tool is no mark ", ("1 < 2 and <tool is no mark ", [])),
        (HERMES, "ends in <tool_ca", ("ends in <tool_ca", [])),
        (DEEPSEEK, ANSWERS["deepseek"][0], ("", [F])),
        (DEEPSEEK, "a\n" + ANSWERS["deepseek"][0], ("a", [F])),
        (DEEPSEEK, '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"k": "你"}<｜tool▁call▁end｜>', ("", [F])),
        (LLAMA3, ANSWERS["llama3"][0], ("", [F])),
        (LLAMA3, "<|python_tag|>" + ANSWERS["llama3"][0] + "; " + ANSWERS["llama3"][0], ("", [F, F])),
        (LLAMA3, '{"no": "call"}', ('{"no": "call"}', [])),
        (LLAMA3, "prose {", ("prose {", [])),
        (LLAMA3, "  ", ("  ", [])),
        (LLAMA3, '{"type": "function", "name": "f", "parameters": {"k": "你"}}', ("", [F])),
        # A name that was not offered, arguments that are missing, cut off or no object.
        (LLAMA3, '{"name": "g", "parameters": {}}', ('{"name": "g", "parameters": {}}', [])),
        (LLAMA3, '{"name": "f"}', ('{"name": "f"}', [])),
        (LLAMA3, '{"name": "f", "parameters": {"k": "', ('{"name": "f", "parameters": {"k": "', [])),
        (LLAMA3, '{"name": "f", "parameters": [1]} x', ('{"name": "f", "parameters": [1]} x', [])),
        (LLAMA3, "<|python_tag|>print(1)", ("<|python_tag|>print(1)", [])),
        # Braces, quotes and escapes inside of arguments.
        (LLAMA3, NESTED % "parameters", ("", [("f", HARD)])),
        (HERMES, "<tool_call>" + NESTED % "arguments" + "</tool_call>", ("", [("f", HARD)])),
        (HERMES, "```json\n" + NESTED % "arguments" + "\n```", ("", [("f", HARD)])),
        (DEEPSEEK, DEEP % ("f", json.dumps(HARD, ensure_ascii=False)), ("", [("f", HARD)])),
        (DEEPSEEK, DEEP % ("f", '{"k": "你"}') + DEEP % ("g", "{}"), ("", [F, ("g", {})])),
        (DEEPSEEK, "so\n" + DEEP % ("f", "{broken") + " x", ("so" + DEEP % ("f", "{broken") + " x", [])),
        (DEEPSEEK, (DEEP % ("f", '{"k": "你"}'))[:-30], ((DEEP % ("f", '{"k": "你"}'))[:-30], [])),
        # A small Qwen model forgets the marks.
        (HERMES, BARE, ("", [F])),
        (HERMES, BARE + "\n" + BARE + "\n", ("", [F, F])),
        (HERMES, f"Sure.\n\n```json\n{BARE}\n```\n", ("Sure.", [F])),
        (HERMES, f"```\n{BARE}\n```\n\n```json\n{BARE}\n``` Done.", (" Done.", [F, F])),
        (HERMES, f"<tools>\n{BARE}\n</tools>", ("", [F])),
        (HERMES, "```json\n{}\n``` and ```py\nx\n```", ("```json\n{}\n``` and ```py\nx\n```", [])),
        (HERMES, f"I would write {BARE}", (f"I would write {BARE}", [])),
        (HERMES, '{"name": "get_more", "arguments": {}}', ('{"name": "get_more", "arguments": {}}', [])),
        (HERMES, '{"name": "ge', ('{"name": "ge', [])),
    ],
)
def test_calls_are_told_from_prose(dialect: Dialect, text: str, want: tuple[str, list[Any]]) -> None:
    for size in (1, 2, 3, 7, 1000):
        assert read(dialect, text, size) == want, size


@given(
    st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                '{"name": "f"}',
                "<tool",
                " ",
                "\n",
                "x",
                BARE,
                "```",
                "json",
                BARE[:20],
            ]
        ),
        max_size=9,
    ),
    st.integers(1, 6),
)
def test_any_chunking_reads_the_same(parts: list[str], size: int) -> None:
    text = "".join(parts)
    assert read(HERMES, text, size) == read(HERMES, text, 1000)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("dialect", [HERMES, DEEPSEEK, LLAMA3], ids=lambda one: one.name)
def test_a_call_in_a_thought_is_thought_and_one_behind_it_is_a_call(dialect: Dialect, size: int) -> None:
    call = ANSWERS[dialect.name][0]
    text = f"I could write ```json\n{BARE}\n``` or {call}.</think>\n\n{call}"
    reader = Reader(ReasoningSplitter(inside=True), CallReader(dialect, [Tool("f")]))
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    found = [reader.push(part, last=i == len(parts) - 1) for i, part in enumerate(parts)]
    assert "".join(thought for thought, _, _ in found) == text.partition("</think>")[0]
    assert "".join(answer for _, answer, _ in found) == ""
    assert [(c.name, json.loads(c.arguments)) for _, _, calls in found for c in calls] == [F]
    assert reader.called


def test_one_call_where_several_may_not_be_made() -> None:
    text = ANSWERS["hermes"][0] + "\n" + ANSWERS["hermes"][0] + " and"
    assert read(HERMES, text, 4, parallel=False) == ("", [F])


def test_a_strict_tool_is_called_without_marks_only_by_what_fits() -> None:
    tools = [Tool("f", "", SCHEMA, strict=True)]
    for arguments, good in (('{"k": "你"}', True), ('{"k": "long"}', False), ('{"x": 1}', False)):
        text = f'{{"name": "f", "arguments": {arguments}}}'
        want = ("", [("f", json.loads(arguments))]) if good else (text, [])
        assert read(HERMES, text, 3, tools=tools) == want


def test_dialects_are_known_by_their_marks() -> None:
    assert [dialect_of(t) for t in (QWEN, DISTILL, LLAMA, "{{ messages }}")] == [
        HERMES,
        DEEPSEEK,
        LLAMA3,
        None,
    ]


def test_a_name_that_could_break_a_grammar_is_refused() -> None:
    for name in ("", 'a"b', "a b", "x" * 129):
        with pytest.raises(RequestError):
            Tool(name)


# -- over HTTP -------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=["hermes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek", "llama3"))],
)
def caller(request: pytest.FixtureRequest) -> Iterator[Server]:
    answer, template = ANSWERS[request.param]
    with fake_server(
        script=[["output▁begin", "done"], ["tool\n5", "done"], ["tool<|end", "done"], ["please", answer]],
        reply="I will not.",
        chat_template=template,
        context=2048,
        batch=256,
    ) as server:
        yield server


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


def test_a_call_that_is_cut_off_is_no_call_and_nothing_of_it_is_lost(caller: Server) -> None:
    body = {"messages": user("please"), "tools": TOOLS, "temperature": 0, "max_tokens": 38}
    choice = caller.post(CHAT, body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    shown = choice["message"]["content"].rstrip("\ufffd")
    assert shown
    assert any(shown in answer for answer, _ in ANSWERS.values())
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
