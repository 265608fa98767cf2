"""Tool calls told from prose, for any chunking of the text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.reasoning import ReasoningSplitter
from edge.server.conversation import AnswerReader
from edge.server.tool_dialects import ACTION, DEEPSEEK, HERMES, LLAMA3, MISTRAL, Dialect, Tool
from edge.server.tool_parser import ToolParser
from tests.support.tool_templates import ANSWERS, SCHEMA

F = ("f", {"k": "你"})


BARE = '{"name": "f", "arguments": {"k": "你"}}'


HARD = {"k": 'a "}" {{b}} \\', "n": {"é": [{}, {"x": "</tool"}]}}


NESTED = '{"name": "f", "%s": ' + json.dumps(HARD, ensure_ascii=False) + "}"


DEEP = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n%s\n```<｜tool▁call▁end｜>"


def read(dialect: Dialect, text: str, size: int, **given: Any) -> tuple[str, list[tuple[str, Any]]]:
    reader = ToolParser(dialect, given.pop("tools", [Tool("f"), Tool("get")]), **given)
    shown, calls = "", []
    for i in range(0, len(text), size):
        more, new = reader.push(text[i : i + size])
        shown, calls = shown + more, calls + new
    more, new = reader.push("", last=True)
    return shown + more, [(call.name, json.loads(call.arguments)) for call in calls + new]


@pytest.mark.parametrize(
    ("dialect", "text", "want"),
    [
        (HERMES, 'Sure. <tool_call>{"name": "f", "argu', "Sure."),
        (HERMES, "Sure. <tool_ca", "Sure."),
        (HERMES, "1 <", "1 <"),
        (HERMES, "```json\n" + BARE[:-4], ""),
        (DEEPSEEK, "a\n" + ANSWERS["deepseek"][0][:40], "a"),
        (DEEPSEEK, "a\n" + ANSWERS["deepseek"][0][:30], "a"),
        (LLAMA3, "<|python_t", ""),
        (LLAMA3, ANSWERS["llama3"][0][:-3], ""),
        (LLAMA3, '{"na', '{"na'),
    ],
)
def test_a_call_that_the_limit_cuts_off_leaves_no_mark(dialect: Dialect, text: str, want: str) -> None:
    for size in (1, 3, 1000):
        reader, shown = ToolParser(dialect, [Tool("f")]), ""
        for i in range(0, len(text), size):
            more, calls = reader.push(text[i : i + size])
            assert calls == []
            shown += more
        more, calls = reader.push("", last=True, cut=True)
        assert (shown + more, calls) == (want, [])


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
        # Several calls as one list, with a mark before it or without.
        (MISTRAL, ANSWERS["mistral"][0], ("", [F])),
        (MISTRAL, f"[TOOL_CALLS] [{BARE}, {BARE}]", ("", [F, F])),
        (MISTRAL, f"[{BARE},{BARE}] Done.", ("Done.", [F, F])),
        (LLAMA3, f"[{BARE}, {BARE}]", ("", [F, F])),
        (MISTRAL, "[1, 2] and [TOOL_C", ("[1, 2] and [TOOL_C", [])),
        (MISTRAL, f'[{BARE}, {{"name": "g"}}]', ('{"name": "g"}]', [F])),
        # A name in front of the arguments.
        (ACTION, ANSWERS["action"][0], ("", [F])),
        (ACTION, "\n".join([ANSWERS["action"][0]] * 2) + "\n", ("", [F, F])),
        (ACTION, "Action: f is what I would do", ("Action: f is what I would do", [])),
        (ACTION, 'Action: g\nAction Input: {"k": 1}', ('Action: g\nAction Input: {"k": 1}', [])),
        (ACTION, "Action: f\nAction Input: " + json.dumps(HARD), ("", [("f", HARD)])),
        (HERMES, ANSWERS["action"][0], (ANSWERS["action"][0], [])),
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
                "[",
                "]",
                ",",
                ANSWERS["action"][0],
            ]
        ),
        max_size=9,
    ),
    st.integers(1, 6),
)
def test_any_chunking_reads_the_same(parts: list[str], size: int) -> None:
    text = "".join(parts)
    for dialect in (HERMES, ACTION):
        assert read(dialect, text, size) == read(dialect, text, 1000)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("dialect", [HERMES, DEEPSEEK, LLAMA3, MISTRAL, ACTION], ids=lambda one: one.name)
def test_a_call_in_a_thought_is_thought_and_one_behind_it_is_a_call(dialect: Dialect, size: int) -> None:
    call = ANSWERS[dialect.name][0]
    text = f"I could write ```json\n{BARE}\n``` or {call}.</think>\n\n{call}"
    reader = AnswerReader(ReasoningSplitter(inside=True), ToolParser(dialect, [Tool("f")]))
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    found = [reader.push(part, last=i == len(parts) - 1) for i, part in enumerate(parts)]
    assert "".join(thought for thought, _, _ in found) == text.partition("</think>")[0]
    assert "".join(answer for _, answer, _ in found) == ""
    assert [(c.name, json.loads(c.arguments)) for _, _, calls in found for c in calls] == [F]


def test_one_call_where_several_may_not_be_made() -> None:
    text = ANSWERS["hermes"][0] + "\n" + ANSWERS["hermes"][0] + " and"
    assert read(HERMES, text, 4, parallel=False) == ("", [F])


def test_a_strict_tool_is_called_without_marks_only_by_what_fits() -> None:
    tools = [Tool("f", "", SCHEMA, strict=True)]
    for arguments, good in (('{"k": "你"}', True), ('{"k": "long"}', False), ('{"x": 1}', False)):
        text = f'{{"name": "f", "arguments": {arguments}}}'
        want = ("", [("f", json.loads(arguments))]) if good else (text, [])
        assert read(HERMES, text, 3, tools=tools) == want


ODD = ["NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', '{"\\udfff": 1}', "[" * 20_000 + "]" * 20_000]


@pytest.mark.parametrize("value", ODD, ids=["nan", "infinity", "float", "int", "half", "key", "deep"])
@pytest.mark.parametrize("dialect", [HERMES, DEEPSEEK, LLAMA3, MISTRAL, ACTION], ids=lambda one: one.name)
@pytest.mark.parametrize("strict", [False, True])
def test_arguments_that_no_client_can_read_are_text(dialect: Dialect, value: str, *, strict: bool) -> None:
    text = ANSWERS[dialect.name][0].replace('"你"', value)
    shown, calls = read(dialect, text, len(text), tools=[Tool("f", parameters={}, strict=strict)])
    assert calls == [] and value in shown


def test_a_name_that_is_no_text_and_arguments_within_a_text_are_read_alike() -> None:
    for body in ('{"name": "\\ud800", "arguments": {}}', '{"name": "f", "arguments": "{\\"k\\": NaN}"}'):
        text = f"<tool_call>{body}</tool_call>"
        assert read(HERMES, text, len(text))[1] == []
