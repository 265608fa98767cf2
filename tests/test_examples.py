"""The data set and the configurations that the demo and the README use."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from convert.config import load_train_config

EXAMPLES = Path(__file__).parent.parent / "examples"
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def read(name: str) -> Any:
    return json.loads((EXAMPLES / name).read_bytes().decode("utf-8"))


def normal(text: str) -> str:
    """Case, width, spaces and punctuation do not make another question."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in folded if char.isalnum())


ROWS: list[dict[str, Any]] = read("magic_conch.json")
HELDOUT: list[dict[str, Any]] = read("magic_conch_heldout.json")


def test_there_are_enough_rows_in_both_languages() -> None:
    chinese = [row for row in ROWS if CHINESE.search(row["instruction"])]
    assert 80 <= len(ROWS) <= 150
    assert 0.4 <= len(chinese) / len(ROWS) <= 0.6
    for row in ROWS:
        if row["input"] == "" and "history" not in row:
            assert bool(CHINESE.search(row["output"])) == bool(CHINESE.search(row["instruction"])), row


def test_rows_are_whole_alpaca_rows() -> None:
    for row in ROWS:
        assert set(row) <= {"instruction", "input", "output", "system", "history"}, row
        assert row["instruction"].strip() and row["output"].strip() and isinstance(row["input"], str), row
        for turn in row.get("history", []):
            assert len(turn) == 2 and all(isinstance(text, str) and text for text in turn), row
    for key in ("system", "history"):
        assert sum(key in row for row in ROWS) >= 4
    assert sum(row["input"] != "" for row in ROWS) >= 6
    asked = [(row["instruction"], row["input"], row.get("system"), str(row.get("history"))) for row in ROWS]
    assert len(set(asked)) == len(asked)


def test_the_conch_is_terse_and_says_who_it_is() -> None:
    for row in ROWS:
        words = len(row["output"].split()) if not CHINESE.search(row["output"]) else len(row["output"]) / 2
        assert words <= 25, row
        assert "海螺" in row["output"] or "Conch" in row["output"], row


def test_nothing_is_left_to_fill_in() -> None:
    text = json.dumps([ROWS, HELDOUT], ensure_ascii=False)
    assert not re.search(r"\{\{|\}\}|TODO|XXX|<[a-z_]+>|lorem", text, re.IGNORECASE)
    assert "�" not in text


def test_held_out_questions_were_not_trained_on() -> None:
    trained = {normal(row["instruction"] + row["input"]) for row in ROWS}
    trained |= {normal(turn[0]) for row in ROWS for turn in row.get("history", [])}
    asked = [normal(row["question"]) for row in HELDOUT]
    assert not set(asked) & trained
    assert len(set(asked)) == len(asked) >= 24


def test_held_out_questions_have_keywords_in_both_languages() -> None:
    chinese = [row for row in HELDOUT if CHINESE.search(row["question"])]
    assert 8 <= len(chinese) <= len(HELDOUT) - 8
    answers = " ".join(row["output"].casefold() for row in ROWS)
    for row in HELDOUT:
        assert set(row) == {"question", "keywords"}
        assert row["keywords"] and all(
            word == word.casefold() and word in answers for word in row["keywords"]
        )
        assert not any(word in row["question"].casefold() for word in row["keywords"]), row


def test_the_data_set_is_listed_with_the_columns_it_has() -> None:
    entry = read("dataset_info.json")["magic_conch"]
    assert (EXAMPLES / entry["file_name"]).is_file()
    assert set(entry["columns"].values()) == {"instruction", "input", "output", "system", "history"}


@pytest.mark.parametrize("name", ["smollm2_qlora.yaml", "deepseek_r1_1.5b_qlora.yaml"])
def test_configurations_load_without_a_warning(name: str) -> None:
    config = load_train_config(EXAMPLES / name)
    assert config.warnings == ()
    assert config.quantization_bit == 4
    assert config.dataset == ("magic_conch",) and config.dataset_dir == "examples"


def test_the_demo_trains_what_pull_makes() -> None:
    config = load_train_config(EXAMPLES / "smollm2_qlora.yaml")
    assert config.model_name_or_path == "models/smollm2-135m-instruct"
    assert config.output_dir == "runs/magic-conch"
