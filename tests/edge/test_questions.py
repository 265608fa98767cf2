"""Files of questions in the forms that people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge.errors import InputError
from edge.questions import Question, read

U, A, S = ({"role": role, "content": role} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    ("row", "messages", "label"),
    [
        ({"instruction": "user", "input": "", "output": "assistant"}, [U], "assistant"),
        ({"instruction": "a", "input": "b"}, [{"role": "user", "content": "a\nb"}], ""),
        ({"question": "user", "system": "system"}, [S, U], ""),
        ({"input": "user", "答案": 7}, [U], "7"),
        ({"prompt": "user", "history": [["user", "assistant"]]}, [U, A, U], ""),
        ({"messages": [S, U, A]}, [S, U], "assistant"),
        ({"conversations": [{"from": "human", "value": "user"}]}, [U], ""),
    ],
)
def test_rows_of_every_form(tmp_path: Path, row: dict[str, Any], messages: Any, label: str) -> None:
    for name, text in (("a.jsonl", json.dumps(row)), ("a.json", json.dumps([row], indent=1))):
        path = tmp_path / name
        path.write_text("\ufeff" + text, encoding="utf-8")
        [found] = read(path)
        assert (found.messages, found.label) == (messages, label)


def test_lines_of_text_and_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("你好？\r\n\n  b\n".encode())
    assert read(path, "s") == [
        Question(f"line {line}", [{"role": "system", "content": "s"}, {"role": "user", "content": text}])
        for line, text in ((1, "你好？"), (3, "b"))
    ]
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"two\nlines",yes\nb,\n', encoding="utf-8")
    assert [(one.messages[0]["content"], one.label) for one in read(path)] == [
        ("two\nlines", "yes"),
        ("b", ""),
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"question": "a"}\n{"question": }', "line 2"),
        ("a.json", "[1,]", "cannot be read"),
        ("a.json", '[{"question": "a"}, {"answer": "b"}]', "row 2 asks nothing"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "line 1 asks nothing"),
        ("a.jsonl", '{"question": "\\ud800"}', "line 1"),
        ("a.csv", 'question\n"a', "cannot be read"),
        ("a.txt", "\n", "no question"),
        ("a.xlsx", "", "questions are read from"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read(tmp_path / name)


def test_a_file_that_is_not_there_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("问".encode("gb18030"))
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path / "a.txt")
