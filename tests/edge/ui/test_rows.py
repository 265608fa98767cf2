"""A row is written back in the file's own format, and all bytes of others stay as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import EdgeError, InputError
from edge.ui import rows

DATA = [{"问": "你好？", "答": "a"}, {"问": "b", "答": [{"k": 1}], "n": 1.50}, {"问": "c", "答": "d"}]
COMPACT = (",", ":")


def lines(**options: Any) -> str:
    return "\n".join(json.dumps(row, **options) for row in DATA) + "\n"


FILES = {
    "indented.json": json.dumps(DATA, ensure_ascii=False, indent=2),
    "tabs.json": "\ufeff" + json.dumps(DATA, ensure_ascii=False, indent="\t").replace("\n", "\r\n") + "\r\n",
    "one-line.json": json.dumps(DATA, ensure_ascii=False, separators=COMPACT),
    "escaped.json": json.dumps(DATA, indent=4),
    "row-a-line.json": "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in DATA) + "\n]\n",
    "lines.jsonl": "\n" + lines(ensure_ascii=False),
    "lines.json": lines(separators=COMPACT),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_only_the_edited_row_changes(tmp_path: Path, name: str) -> None:
    path, text = tmp_path / name, FILES[name]
    path.write_bytes(text.encode())
    found = rows.rows(path)
    assert [row.value for row in found] == DATA
    first = 2 if name == "lines.jsonl" else 1
    assert [row.number for row in found] == [first, first + 1, first + 2]
    # What is written as it was read is the same file, byte by byte: the format is the file's own.
    for row in found:
        assert row.value is not None
        rows.write(path, row, row.value)
        assert path.read_bytes() == text.encode()
    new = {**DATA[1], "问": "新的\n问题 <b>"}
    rows.write(path, found[1], new)
    changed = path.read_bytes().decode()
    assert [row.value for row in rows.rows(path)] == [DATA[0], new, DATA[2]]
    assert ("新的" in changed) == ("\\u" not in text)
    before, behind = found[1].start, len(text) - found[1].start - len(found[1].raw)
    assert changed[:before] == text[:before] and changed[len(changed) - behind :] == text[-behind:]


@pytest.mark.slow
@given(st.lists(st.fixed_dictionaries({"q": st.text(), "a": st.text()}), min_size=1), st.data())
def test_any_text_goes_into_any_row(tmp_path_factory: pytest.TempPathFactory, rows_: Any, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_).encode())
    index = data.draw(st.integers(0, len(rows_) - 1))
    new = {"q": data.draw(st.text()), "a": "b"}
    rows.write(path, rows.rows(path)[index], new)
    assert [row.value for row in rows.rows(path)] == [*rows_[:index], new, *rows_[index + 1 :]]


def test_csv_keeps_its_lines(tmp_path: Path) -> None:
    text = '\ufeffq,a\r\n"one\r\ntwo",1\r\n\r\n问,Hello, world\r\nlast,"3"'
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    found = rows.rows(path)
    assert [row.number for row in found] == [3, 5, 6]
    assert found[0].value == {"q": "one\r\ntwo", "a": "1"}
    # A comma without quotes, the most common fault, is mended by saving.
    assert found[1].value == {"q": "问", "a": "Hello, world"}
    rows.write(path, found[1], found[1].value)
    assert path.read_bytes().decode() == text.replace("Hello, world", '"Hello, world"')
    rows.write(path, rows.rows(path)[2], {"q": "last", "a": '"x"\ny'})
    assert path.read_bytes().decode().endswith('\r\nlast,"""x""\ny"')


def test_what_is_no_row_is_mended_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": 1}\n{"q": 2,}\n[3]\n', encoding="utf-8")
    good, bad, other = rows.rows(path)
    assert (bad.value, bad.raw, other.value) == (None, '{"q": 2,}', None)
    for text in ('{"q": 2,}', "[3]", '"x"'):
        with pytest.raises(InputError, match="row 2"):
            rows.write(path, bad, text)
    rows.write(path, bad, '{"q": "两"}')
    assert path.read_text("utf-8") == '{"q": 1}\n{"q": "两"}\n[3]\n'
    with pytest.raises(EdgeError, match="changed meanwhile"):
        rows.write(path, bad, {"q": 4})
    rows.write(path, good, {"q": 5})
    assert path.read_text("utf-8").startswith('{"q": 5}\n{"q": "两"}')


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"q": 1},', "row 2: not valid JSON"),
        ("a.json", b'[{"q": 1} {"q": 2}]', "row 1: not valid JSON"),
        ("a.json", b'[{"q": 1}', "row 1: not valid JSON"),
        ("a.csv", b'q\n"a', "not valid CSV"),
        ("a.jsonl", "问".encode("gb18030"), "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        rows.rows(tmp_path / name)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": 1}\n', encoding="utf-8")
    [row] = rows.rows(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        rows.write(path, row, {"q": 2})
    assert path.read_text("utf-8") == '{"q": 1}\n' and os.listdir(tmp_path) == ["a.jsonl"]  # noqa: PTH208


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n', encoding="utf-8")
    link = tmp_path / "b.jsonl"
    try:
        link.symlink_to("a.jsonl")
    except OSError:
        pytest.skip("no right to make links")
    rows.write(link, rows.rows(link)[0], {"q": 2})
    assert link.is_symlink() and (tmp_path / "a.jsonl").read_text("utf-8") == '{"q": 2}\n'
