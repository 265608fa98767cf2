"""Data sets as LLaMA-Factory's users have them, read row by row with a reason for each one that is left out.

dataset_info.json -> rows of messages (alpaca, sharegpt, openai) -> training and validation rows.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge.errors import InputError, UsageError

INFO = "dataset_info.json"

_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "messages": "conversations",
    "history": "history", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected",
    "kto_tag": "kto_tag",
}  # fmt: skip
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_OPENAI_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_HARMLESS = {"ranking": False, "split": "train", "subset": None, "folder": None, "num_samples": None}
_PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_]\w*\s*\}\}")
# Braces in code are meant: `{{ name }}` is an answer about Jinja, not a hole in the row.
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)

Message = dict[str, str]


class BadRow(Exception):
    """Why a row cannot be used."""


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation. source: "name, row N" (from 1; in .jsonl the line). messages end with an answer."""

    source: str
    messages: list[Message]


@dataclass
class Report:
    """What was found in the data. bad: (row, reason) of each row left out."""

    rows: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    placeholders: Counter[str] = field(default_factory=Counter)
    placeholder_rows: int = 0
    duplicates: int = 0
    cut: list[str] = field(default_factory=list)
    thoughts_added: int = 0
    thoughts_removed: int = 0

    def lines(self) -> list[str]:
        """Warnings in words, worst first; empty where there is nothing to say."""
        said = []
        if self.bad:
            shown = [f"  {source}: {reason}" for source, reason in self.bad[:10]]
            more = [f"  ... and {len(self.bad) - 10} more"] if len(self.bad) > 10 else []
            said.append("\n".join([f"{len(self.bad)} of {self.rows} rows are left out:", *shown, *more]))
        if self.cut:
            said.append(
                f"{len(self.cut)} rows are longer than cutoff_len: their answers are cut at the end and do "
                f"not learn to stop there (first: {self.cut[0]})"
            )
        if self.placeholders:
            names = ", ".join(f"{name} x {count}" for name, count in self.placeholders.most_common(5))
            said.append(f"{self.placeholder_rows} rows hold placeholders that nothing fills in: {names}")
        if self.duplicates:
            said.append(f"{self.duplicates} rows are duplicates of an earlier one; they are kept")
        if self.thoughts_removed:
            said.append(f"{self.thoughts_removed} rows had a thought, left out by enable_thinking: false")
        return said

    def numbers(self) -> dict[str, Any]:
        """Counts for the manifest."""
        return {
            "rows": self.rows,
            "left_out": len(self.bad),
            "cut": len(self.cut),
            "duplicates": self.duplicates,
            "with_placeholders": self.placeholder_rows,
        }


class _Twice(dict[str, Any]):
    """A JSON object in which a key stands twice."""

    key = ""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    counts = Counter(key for key, _ in pairs)
    twice = _Twice(found)
    twice.key = next(key for key, count in counts.items() if count > 1)
    return twice


def load(
    names: tuple[str, ...], folder: Path, *, max_samples: int | None = None, strict: bool = False
) -> tuple[list[Row], Report]:
    """Rows of the data sets `names` in `folder`, the first `max_samples` of each.

    Raises InputError for missing or unreadable files, where no row is usable, and with `strict` for any bad
    row; UsageError for a name or an entry of dataset_info.json that cannot be used.
    """
    info = _info(folder)
    rows: list[Row] = []
    report = Report()
    seen: set[bytes] = set()
    for name in names:
        if name not in info:
            near = difflib.get_close_matches(name, list(info), n=1)
            hint = f"did you mean '{near[0]}'?" if near else "it names: " + ", ".join(sorted(info)[:20])
            raise UsageError(f"{folder / INFO} has no data set '{name}'", hint)
        entry = _Entry.of(name, info[name])
        path = folder / entry.file_name
        for number, raw in _objects(path)[:max_samples]:
            report.rows += 1
            source = f"{name}, row {number}"
            try:
                if isinstance(raw, BadRow):
                    raise raw
                messages = entry.messages(raw)
            except BadRow as reason:
                report.bad.append((source, str(reason)))
                continue
            rows.append(Row(source, messages))
            _look(messages, report, seen)
    if report.bad and strict:
        raise InputError(report.lines()[0], "mend these rows, or leave `strict` out to go on without them")
    if not rows:
        reasons = "; ".join(f"{source}: {reason}" for source, reason in report.bad[:3])
        raise InputError(
            f"no usable row in {', '.join(names)}" + (f" ({reasons})" if reasons else ": no rows at all"),
            "an alpaca row has `instruction` and `output`; dataset_info.json can name other columns",
        )
    return rows, report


def split(rows: list[Row], val_size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows), at least one of each; no validation for val_size 0.

    Raises UsageError where `val_size` (below 1 a fraction, from 1 a count) leaves nothing to train on.
    """
    if not val_size:
        return rows, []
    held = max(1, round(val_size * len(rows))) if val_size < 1 else int(val_size)
    if held >= len(rows):
        raise UsageError(
            f"val_size: {val_size:g} holds out {held} of {len(rows)} rows, which leaves none to train on",
            f"give at most {len(rows) - 1}, or 0 for none" if len(rows) > 1 else "give 0",
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    chosen = set(order[:held])
    return (
        [row for at, row in enumerate(rows) if at not in chosen],
        [row for at, row in enumerate(rows) if at in chosen],
    )


def _look(messages: list[Message], report: Report, seen: set[bytes]) -> None:
    key = hashlib.sha256(json.dumps(messages).encode("utf-8")).digest()
    report.duplicates += key in seen
    seen.add(key)
    found = [
        hole.replace(" ", "")
        for message in messages
        for hole in _PLACEHOLDER.findall(_CODE.sub("", message["content"]))
    ]
    report.placeholders.update(found)
    report.placeholder_rows += bool(found)


@dataclass(frozen=True)
class _Entry:
    """One data set of dataset_info.json, with every default filled in."""

    file_name: str
    formatting: str
    columns: dict[str, str]
    tags: dict[str, str]

    @classmethod
    def of(cls, name: str, entry: Any) -> _Entry:
        def wrong(what: str) -> UsageError:
            return UsageError(
                f"{INFO}: '{name}' {what}", "it needs file_name; formatting and columns may follow"
            )

        if not isinstance(entry, dict):
            raise wrong("is not an object")
        if not isinstance(entry.get("file_name"), str):
            raise wrong("has no file_name (data sets from a hub or a script are not supported)")
        for key, value in entry.items():
            if key in _HARMLESS and value != _HARMLESS[key]:
                raise wrong(f"has {key}: {value!r}, which is not supported yet")
            if key not in _HARMLESS and key not in (
                "file_name",
                "file_sha1",
                "formatting",
                "columns",
                "tags",
            ):
                raise wrong(f"has the unknown key '{key}'")
        formatting = entry.get("formatting", "alpaca")
        if formatting not in ("alpaca", "sharegpt", "openai"):
            raise wrong(f"has formatting {formatting!r}; alpaca, sharegpt and openai are known")
        columns = dict(_COLUMNS)
        tags = dict(_OPENAI_TAGS if formatting == "openai" else _TAGS)
        if formatting == "openai":
            columns["messages"] = "messages"
        for kind, known in (("columns", columns), ("tags", tags)):
            given = entry.get(kind) or {}
            for key, value in given.items():
                if key not in known:
                    raise wrong(f"has {kind} with the unknown name '{key}'; known: {', '.join(known)}")
                if value is not None:
                    known[key] = value
        return cls(entry["file_name"], formatting, columns, tags)

    def messages(self, raw: Any) -> list[Message]:
        """The row as messages: perhaps system, then user and assistant in turn. Raises BadRow."""
        if isinstance(raw, _Twice):
            raise BadRow(f"the key '{raw.key}' stands twice")
        if not isinstance(raw, dict):
            raise BadRow(f"is {_kind(raw)}, not an object")
        system = _text(raw, self.columns["system"])
        turns = self._alpaca(raw) if self.formatting == "alpaca" else self._shared(raw)
        if system and turns[0]["role"] != "system":
            return [{"role": "system", "content": system}, *turns]
        return turns

    def _alpaca(self, raw: dict[str, Any]) -> list[Message]:
        prompt, query = (_text(raw, self.columns[key]) for key in ("prompt", "query"))
        question = "\n".join(part for part in (prompt, query) if part)
        column = self.columns["response"]
        answer = _text(raw, column)
        if not question:
            raise BadRow(f"`{self.columns['prompt']}` is missing or empty")
        if not answer.strip():
            raise BadRow(f"`{column}` is missing or empty")
        messages = []
        column = self.columns["history"]
        for pair in raw.get(column) or []:
            if not (
                isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) and t for t in pair)
            ):
                raise BadRow(f"`{column}` holds {_kind(pair)} that is no [question, answer] of two texts")
            messages += _turn(*pair)
        return messages + _turn(question, answer)

    def _shared(self, raw: dict[str, Any]) -> list[Message]:
        column = self.columns["messages"]
        given = raw.get(column)
        if not isinstance(given, list):
            raise BadRow(f"`{column}` is {_kind(given)}, not a list of messages")
        if not given:
            raise BadRow(f"`{column}` is empty")
        roles = {self.tags[f"{role}_tag"]: role for role in ("user", "assistant", "system")}
        messages = []
        for number, one in enumerate(given, 1):
            if not isinstance(one, dict):
                raise BadRow(f"message {number} is {_kind(one)}, not an object")
            role = one.get(self.tags["role_tag"])
            if role not in roles:
                raise BadRow(f"message {number} has the role {role!r}; tool calls are not supported yet")
            content = _text(one, self.tags["content_tag"])
            if not content.strip():
                raise BadRow(f"message {number} is empty")
            messages.append({"role": roles[role], "content": content})
        turns = messages[1:] if messages[0]["role"] == "system" else messages
        for number, message in enumerate(turns):
            if message["role"] != ("user", "assistant")[number % 2]:
                raise BadRow("its messages are not question and answer in turn")
        if not turns or len(turns) % 2:
            raise BadRow("its last message is not an answer")
        return messages


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(raw: dict[str, Any], column: str) -> str:
    """The text in `column`; "" where it is missing or null. Raises BadRow for another type."""
    value = raw.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"`{column}` is {_kind(value)}, not text")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "a number")


def _info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    if not path.is_file():
        raise InputError(f"no such file: {path}", "dataset_dir names the folder that holds dataset_info.json")
    data = _json(_read(path), path)
    if not isinstance(data, dict):
        raise InputError(f"{path} is not an object of names and data sets")
    if isinstance(data, _Twice):
        raise InputError(f"{path}: the data set '{data.key}' stands twice")
    return data


def _objects(path: Path) -> list[tuple[int, Any]]:
    """(number from 1, value) of each row; the value is a BadRow where a line is no JSON."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise InputError(f"{path}: only .json and .jsonl are read", "convert it to one of these")
    text = _read(path)
    if not text.strip():
        raise InputError(f"{path} is empty")
    if text.lstrip()[0] == "[":
        return list(enumerate(_json(text, path), 1))
    rows: list[tuple[int, Any]] = []
    # Not splitlines: U+2028 and its like may stand inside a JSON text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, _json(line, path)))
            except InputError as error:
                rows.append((number, BadRow(error.message.removeprefix(f"{path}: "))))
    if path.suffix.lower() == ".json" and all(isinstance(row, BadRow) for _, row in rows):
        # One object over several lines, not one object a line: say what is wrong with the whole.
        raise InputError(f"{path} is not a list of rows", "put the rows into [ ... ], or one object a line")
    return rows


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"no such file: {path}", "check file_name in dataset_info.json")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}", "save it as UTF-8") from error


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except json.JSONDecodeError as error:
        before = text[: error.pos].rstrip()
        where = f"line {error.lineno}, column {error.colno}"
        if before.endswith(",") and text[error.pos : error.pos + 1] in ("]", "}"):
            raise InputError(f"{path}: a comma before the closing bracket ({where})", "remove it") from error
        raise InputError(f"{path}: not valid JSON: {error.msg} ({where})") from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid JSON: nested too deeply") from error
