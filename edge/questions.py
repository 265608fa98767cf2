"""A file of questions: what is asked, and the answers that are hoped for, row by row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.errors import InputError

SUFFIXES = (".json", ".jsonl", ".csv", ".txt")
# Names of columns, the first that is there counts.
QUESTIONS = ("instruction", "prompt", "question", "query", "input", "text", "问题")
ANSWERS = ("output", "response", "answer", "completion", "回答", "答案")
_TALKS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question. source: "row N" or "line N". label: the answer hoped for."""

    source: str
    messages: list[dict[str, str]]
    label: str = ""


def read(path: Path, system: str = "") -> list[Question]:
    """The questions of a .json, .jsonl or .csv file of rows, or of a .txt file, one a line.

    A row is LLaMA-Factory's (instruction, input, output; or conversations), OpenAI's (messages), or has a
    column of `QUESTIONS`. system: the prompt of rows without one. Raises InputError, which names the row.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: questions are read from {', '.join(SUFFIXES)}", "save it as one of these")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}", "save it as UTF-8") from error
    found = [_question(path, source, row, system) for source, row in _rows(path, text)]
    if not found:
        raise InputError(f"{path} has no question")
    return found


def _rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    suffix, where = path.suffix.lower(), ""
    try:
        if suffix == ".csv":
            for number, row in enumerate(csv.DictReader(text.splitlines(keepends=True), strict=True), 1):
                yield f"row {number}", row
        elif suffix == ".json" and text.lstrip().startswith("["):
            yield from ((f"row {number}", row) for number, row in enumerate(_parsed(text), 1))
        else:
            # Not splitlines: U+2028 may stand inside a JSON text.
            for number, line in enumerate(text.split("\n"), 1):
                where = f", line {number}"
                if line.strip():
                    yield f"line {number}", line.strip() if suffix == ".txt" else _parsed(line)
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path}{where} cannot be read: {error}", "mend it, and run it again") from error


def _parsed(text: str) -> Any:
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # an escape may be half a surrogate pair
    return value


def _question(path: Path, source: str, row: Any, system: str) -> Question:
    if isinstance(row, str):
        row = {"question": row}
    row = {key: value for key, value in row.items() if value} if isinstance(row, dict) else {}
    talk = next((row[key] for key in _TALKS if isinstance(row.get(key), list)), None)
    label = next((str(row[key]) for key in ANSWERS if key in row), "")
    if talk is not None:
        messages = [_message(turn) for turn in talk]
        if messages and messages[-1]["role"] == "assistant":
            label = messages.pop()["content"]
    else:
        key = next((key for key in QUESTIONS if key in row), "")
        more = row.get("input") if key != "input" else None
        asked = "\n".join(str(part) for part in (row.get(key), more) if part)
        messages = [{"role": "user", "content": asked}] if asked else []
        for before in reversed(row.get("history") or []):
            question, answer = map(str, before)
            messages[:0] = [_message({"role": "user", "content": question}),
                            _message({"role": "assistant", "content": answer})]  # fmt: skip
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"]:
        raise InputError(
            f"{path}, {source} asks nothing", f"give it messages, or one of: {', '.join(QUESTIONS)}"
        )
    prompt = str(row.get("system") or system)
    if prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": prompt})
    return Question(source, messages, label)


def _message(turn: Any) -> dict[str, str]:
    turn = turn if isinstance(turn, dict) else {}
    role = str(turn.get("role", turn.get("from", "")))
    return {"role": _ROLES.get(role, role), "content": str(turn.get("content", turn.get("value", "")))}
