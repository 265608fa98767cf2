"""Choices between answers as rows that DPO and KTO train on, in the folder of the data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge.artefact import json_file
from edge.ui import datasets
from edge.ui.workspace import read_lines

# Stage of the training -> its data set.
NAMES = {"dpo": "preferences_dpo", "kto": "preferences_kto"}
_COLUMNS = {"dpo": ("messages", "chosen", "rejected"), "kto": ("messages", "kto_tag")}


def prefer(folder: Path, messages: list[dict[str, str]], chosen: str, rejected: str) -> None:
    """Keep that one answer is better than another. Raises InputError for a broken dataset_info.json."""
    answers = {"chosen": _answer(chosen), "rejected": _answer(rejected)}
    _keep(folder, "dpo", {"messages": messages, **answers})


def flag(folder: Path, messages: list[dict[str, str]], answer: str, good: bool) -> None:
    """Keep that an answer is good or bad. Raises InputError for a broken dataset_info.json."""
    _keep(folder, "kto", {"messages": [*messages, _answer(answer)], "kto_tag": good})


def count(folder: Path, stage: str) -> int:
    """How many choices are kept for a stage."""
    return len(read_lines(_path(folder, stage)))


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _path(folder: Path, stage: str) -> Path:
    return folder / f"{NAMES[stage]}.jsonl"


def _keep(folder: Path, stage: str, row: dict[str, Any]) -> None:
    """Append a row; it replaces an earlier choice between the same answers."""
    path = _path(folder, stage)
    columns = {name: name for name in _COLUMNS[stage]}
    entry = {
        "file_name": path.name, "formatting": "sharegpt", **({"ranking": True} if stage == "dpo" else {}),
        "columns": columns, "tags": datasets.OPENAI,
    }  # fmt: skip
    if datasets.load(folder).get(NAMES[stage]) != entry:
        datasets.add(folder, NAMES[stage], entry)
    rows = [one for one in read_lines(path) if _subject(one) != _subject(row)] + [row]
    json_file.write_lines(path, rows)


def _subject(row: dict[str, Any]) -> tuple[str, list[str]]:
    """What was judged, whichever way."""
    answers = sorted(row[key]["content"] for key in ("chosen", "rejected") if key in row)
    return json.dumps(row["messages"], sort_keys=True), answers
