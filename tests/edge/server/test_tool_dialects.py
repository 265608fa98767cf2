"""The dialects of tool calls, known by their marks in a chat template."""

from __future__ import annotations

import pytest

from edge.errors import RequestError
from edge.server.tool_dialects import ACTION, DEEPSEEK, HERMES, LLAMA3, MISTRAL, Tool, dialect_of
from tests.support import tool_templates
from tests.support.tool_templates import DISTILL, LLAMA, QWEN


def test_dialects_are_known_by_their_marks() -> None:
    templates = (QWEN, DISTILL, LLAMA, tool_templates.MISTRAL, tool_templates.ACTION, "{{ messages }}")
    assert list(map(dialect_of, templates)) == [HERMES, DEEPSEEK, LLAMA3, MISTRAL, ACTION, None]
    assert dialect_of(tool_templates.MISTRAL + "{# must be of length 9 #}") is None


def test_a_name_that_could_break_a_grammar_is_refused() -> None:
    for name in ("", 'a"b', "a b", "x" * 129):
        with pytest.raises(RequestError):
            Tool(name)
