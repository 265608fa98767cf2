"""dataset_info.json: what people break in it is named and mended; files are known by their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge.errors import InputError
from edge.ui import datasets

GOOD = {
    "a": {"file_name": "a.json"},
    "乙": {"file_name": "b.json", "columns": {"prompt": "q", "response": "r"}},
}
TEXT = json.dumps(GOOD, ensure_ascii=False, indent=2)


@pytest.mark.parametrize(
    "broken",
    [
        TEXT.replace("\n}", ",\n}"),
        TEXT.replace('"a.json"\n', '"a.json",\n'),
        TEXT.replace("  },\n", "  },,\n"),
        TEXT.replace("  },\n", "  }\n"),
        TEXT.replace('"q",\n', '"q"\n'),
        TEXT.replace(": {", "：{", 1).replace('"a"', "“a”"),
        TEXT.replace(",", "，"),
        TEXT.replace('"', "'"),
        TEXT.replace("{\n", "{\n// mine\n", 1),
        TEXT[:-2],
        "\ufeff" + TEXT.replace("  ", "\t") + "\n,",
    ],
)
def test_what_people_break_is_mended(broken: str) -> None:
    with pytest.raises(InputError, match=r"line \d+, column"):
        datasets.parse(broken, Path("dataset_info.json"))
    if broken.endswith("\n,"):
        broken = broken[:-1]
    assert json.loads(datasets.mended(broken)) == GOOD


WIDE = [{"q": "他说：“好，{走}”", "a": "x,\\n]"}, {"q": 'say "no"', "a": "1"}]
ROWS = json.dumps(WIDE, ensure_ascii=False, indent=1)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("a.json", ROWS.replace("\n]", ",\n]")),
        ("a.json", ROWS.replace(" },", " },,")),
        ("a.json", ROWS.replace(" },", " }")),
        ("a.json", ROWS.replace('"\n }', '",\n }')),
        ("a.json", ROWS.replace(" },", " }，").replace("[", "［", 1)),
        ("a.json", ROWS[:-2]),
        ("a.json", "\n".join(map(json.dumps, WIDE))),
        ("a.jsonl", "".join(json.dumps(row) + ",\n" for row in WIDE)),
        ("a.jsonl", "[\n" + ",\n".join(map(json.dumps, WIDE)) + "\n]"),
    ],
)
def test_rows_are_mended_and_their_texts_stay(tmp_path: Path, name: str, broken: str) -> None:
    path = tmp_path / name
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{name}: .*\(line \d+, column"):
        datasets.first_row(path)
    datasets.mend_rows(path)
    text = path.read_text("utf-8")
    assert (list(map(json.loads, text.splitlines())) if name == "a.jsonl" else json.loads(text)) == WIDE


def test_a_file_of_a_chinese_windows_becomes_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(ROWS, encoding="gb18030")
    with pytest.raises(InputError, match=r"a\.json cannot be read: 'utf-8'"):
        datasets.first_row(path)
    datasets.mend_rows(path)
    assert json.loads(path.read_text("utf-8")) == WIDE
    path.write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match=r"a\.json is neither UTF-8 nor GB18030"):
        datasets.mend_rows(path)


def test_what_cannot_be_mended_is_said() -> None:
    for text in ('{"a": {"file_name" "b"}}', "[]", "{{}"):
        with pytest.raises(InputError):
            datasets.mended(text)


def test_saving_keeps_what_was_there(tmp_path: Path) -> None:
    datasets.add(tmp_path, "a", GOOD["a"])
    datasets.add(tmp_path, "乙", GOOD["乙"])
    assert datasets.load(tmp_path) == GOOD
    assert json.loads((tmp_path / "dataset_info.json.bak").read_text("utf-8")) == {"a": GOOD["a"]}
    (tmp_path / "dataset_info.json").write_text("{,}", encoding="utf-8")
    for act in (lambda: datasets.add(tmp_path, "c", {}), lambda: datasets.save(tmp_path, "{,}")):
        with pytest.raises(InputError, match="line 1, column 2"):
            act()
    assert (tmp_path / "dataset_info.json").read_text("utf-8") == "{,}"


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"instruction": "q", "input": "", "output": "a"},
         {"columns": {"prompt": "instruction", "response": "output", "query": "input"}}),
        ({"question": "q", "answer": "a", "system": "s"},
         {"columns": {"prompt": "question", "response": "answer", "system": "system"}}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"},
         {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}),
        ({"prompt": "q", "completion": "a", "label": False},
         {"columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"}}),
        ({"text": "t"}, {"columns": {"prompt": "text"}}),
        ({"messages": TURNS},
         {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": datasets.OPENAI}),
        ({"conversations": [{"from": "human", "value": "q"}]},
         {"formatting": "sharegpt", "columns": {"messages": "conversations"}}),
    ],
)  # fmt: skip
def test_a_file_is_known_by_its_first_row(row: dict[str, Any], want: dict[str, Any]) -> None:
    assert datasets.entry_for("f.json", row) == {"file_name": "f.json", **want}


def test_unknown_columns_are_asked_for() -> None:
    assert datasets.entry_for("f.json", {"a": 1, "b": 2}) is None
    assert datasets.entry_for("f.json", {"prompt": "only a question"}) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '\ufeff[{"q": 1}, {"q": 2}]'),
        ("a.json", '{"q": 1}'),
        ("a.jsonl", '\n{"q": 1}\n{"q": 2}\n'),
        ("a.csv", "q\n1\n2\n"),
    ],
)
def test_the_first_row(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert str(datasets.first_row(tmp_path / name)["q"]) == "1"


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "[1,]"), ("a.json", "[]"), ("a.jsonl", ""), ("a.csv", "")]
)
def test_a_file_without_a_row_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=name):
        datasets.first_row(tmp_path / name)


def test_an_uploaded_name_stays_in_the_folder_and_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    assert datasets.free_name(tmp_path, "a.json") == tmp_path / "a-2.json"
    for name in ("../../x.json", "..\\x.json", "C:\\x.json"):
        assert datasets.free_name(tmp_path, name) == tmp_path / "x.json"
    for name in ("a.exe", ".json", "dataset_info.json"):
        with pytest.raises(InputError):
            datasets.free_name(tmp_path, name)


@pytest.mark.slow
def test_what_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    deep = "[" * 50_000
    (tmp_path / "a.json").write_text(deep, encoding="utf-8")
    for refused in (lambda: datasets.parse(deep, tmp_path), lambda: datasets.mended('{"a": ' + deep)):
        with pytest.raises(InputError):
            refused()
    with pytest.raises(InputError, match=r"a\.json: not valid JSON: nested too deeply"):
        datasets.first_row(tmp_path / "a.json")


def test_files_that_no_data_set_names(tmp_path: Path) -> None:
    for name in ("a.json", "b.csv", ".c.json", "d.txt", "dataset_info.json", "e.jsonl"):
        (tmp_path / name).touch()
    found = datasets.unlisted(
        tmp_path, {"a": {"file_name": "a.json"}, "x": "no entry", "h": {"hf_hub_url": "o/n"}}
    )
    assert [path.name for path in found] == ["b.csv", "e.jsonl"]
    assert datasets.unlisted(tmp_path / "none", {}) == []
    assert datasets.editable(tmp_path, {"file_name": "a.json"}) == tmp_path / "a.json"
    for entry in ({"file_name": "none.json"}, {"file_name": "d.txt"}, {"hf_hub_url": "o/n"}, "no entry"):
        assert datasets.editable(tmp_path, entry) is None
