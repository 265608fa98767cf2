"""Choices as the rows that training reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convert.data import dataset_info
from edge.errors import InputError
from edge.ui import preferences

ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "谁?"}]


def test_rows_are_read_by_the_training(tmp_path: Path) -> None:
    preferences.prefer(tmp_path, ASKED, "good", "bad")
    preferences.flag(tmp_path, ASKED, "good", True)
    preferences.flag(tmp_path, ASKED, "bad", False)
    assert [preferences.count(tmp_path, stage) for stage in ("dpo", "kto")] == [1, 2]
    pairs, flags = (
        [entry.row("", raw) for _, raw in entry.rows()]
        for entry in dataset_info.read_info(str(tmp_path), tuple(preferences.NAMES.values())).values()
    )
    [pair] = pairs
    assert (pair.chosen, pair.rejected, pair.messages) == ("good", "bad", ASKED)
    assert [(row.messages[-1]["content"], row.good) for row in flags] == [("good", True), ("bad", False)]
    assert flags[0].messages[:-1] == ASKED


def test_a_change_of_mind_replaces_the_row_and_other_data_sets_stay(tmp_path: Path) -> None:
    info = tmp_path / "dataset_info.json"
    info.write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")
    for chosen, rejected in (("a", "b"), ("b", "a"), ("c", "a")):
        preferences.prefer(tmp_path, ASKED, chosen, rejected)
    rows = [json.loads(line) for line in (tmp_path / "preferences_dpo.jsonl").read_text("utf-8").splitlines()]
    assert [(row["chosen"]["content"], row["rejected"]["content"]) for row in rows] == [
        ("b", "a"),
        ("c", "a"),
    ]
    assert list(json.loads(info.read_text("utf-8"))) == ["d", "preferences_dpo"]
    info.write_text('{"d": {},}', encoding="utf-8")
    with pytest.raises(InputError, match="line 1"):
        preferences.flag(tmp_path, ASKED, "a", True)
    assert preferences.count(tmp_path, "kto") == 0
