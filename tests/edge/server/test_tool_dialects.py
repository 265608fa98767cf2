"""The dialects of tool calls, known by their marks in a chat template."""

from __future__ import annotations

import pytest

from edge.errors import RequestError
from edge.server.tool_dialects import DEEPSEEK, HERMES, LLAMA3, Tool, dialect_of
from tests.support.tool_templates import DISTILL, LLAMA, QWEN


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
