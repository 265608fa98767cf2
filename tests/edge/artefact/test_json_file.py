from __future__ import annotations

from pathlib import Path

import pytest

from edge.artefact import json_file
from edge.errors import InputError


def test_lines_are_objects_of_one_line_each() -> None:
    text = '"half": 1}\n{"a": "one\u2028line"}\r\n\n[1]\n{"b": 2}\n{"c": '
    assert json_file.lines(text) == [{"a": "one\u2028line"}, {"b": 2}]


def test_lines_without_end_are_passed_over() -> None:
    assert json_file.lines("[" * 100_000 + '\n{"a": 1}') == [{"a": 1}]


def test_a_file_is_written_whole_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    json_file.write(path, {"name": "海螺"})
    json_file.write(path, {"name": "神奇海螺"})
    assert json_file.read(path) == {"name": "神奇海螺"}
    assert "神奇海螺" in path.read_text(encoding="utf-8") and list(tmp_path.iterdir()) == [path]


def test_what_is_no_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(InputError, match=r"list\.json is not a JSON object"):
        json_file.read(path)
    assert json_file.read(tmp_path / "absent.json") == {}
    with pytest.raises(InputError, match=r"absent\.json cannot be read"):
        json_file.read(tmp_path / "absent.json", required=True)
