"""One row of a data file: read, and written back where it stands. Every other byte stays as it is."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.artefact import json_file
from edge.errors import EdgeError, InputError

SUFFIXES = (".json", ".jsonl", ".csv")
_BLANK = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Row:
    """number: as reasons name it: of a list its place from 1, else the line that it ends on. raw: its text at
    `start` in the file's. value: by column; None where the text is no JSON object. columns: of a CSV.
    """

    number: int
    start: int
    raw: str
    value: dict[str, Any] | None
    columns: tuple[str, ...] = ()


def rows(path: Path) -> list[Row]:
    """The rows of a .json, .jsonl or .csv file. Raises InputError for what is none, or is no UTF-8."""
    return list(_rows(path, _text(path)))


def write(path: Path, row: Row, value: dict[str, Any] | str) -> None:
    """Put `value` in the row's place, in the file's own format; a str: the row's whole text, as JSON.

    Raises InputError for a value that is no JSON object, EdgeError where the file's row is no longer `row`.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"row {row.number} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"row {row.number} is not a JSON object")
    path = path.resolve()  # of a link the file, not the link, is replaced
    text = _text(path)
    if text[row.start : row.start + len(row.raw)] != row.raw:
        raise EdgeError(f"row {row.number} of {path.name} was changed meanwhile", "look at it again")
    new = _as_csv(row, value) if row.columns else _as_json(row, text, value)
    json_file.write_text(path, text[: row.start] + new + text[row.start + len(row.raw) :])


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}", "save it as UTF-8") from error


def _rows(path: Path, text: str) -> Iterator[Row]:
    start = len(text) - len(text.removeprefix("\ufeff"))
    if path.suffix.lower() == ".csv":
        yield from _csv(path, text, start)
    elif path.suffix.lower() == ".json" and text[_end(text, start) :].startswith("["):
        yield from _list(path, text, _end(text, start) + 1)
    else:
        for number, line in enumerate(text[start:].split("\n"), 1):
            raw = line.strip()
            if raw:
                yield Row(number, start + line.index(raw), raw, _object(raw))
            start += len(line) + 1


def _end(text: str, at: int) -> int:
    """Where the blanks at `at` end."""
    return _BLANK.match(text, at).end()  # type: ignore[union-attr]


def _list(path: Path, text: str, at: int) -> Iterator[Row]:
    number = 0
    try:
        while not text.startswith("]", at := _end(text, at)):
            number += 1
            value, end = _DECODER.raw_decode(text, at)
            yield Row(number, at, text[at:end], value if isinstance(value, dict) else None)
            at = _end(text, end)
            if text.startswith(",", at):
                at += 1
            elif not text.startswith("]", at):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name}, row {number}: not valid JSON: {error}", "mend it by hand") from error


def _object(raw: str) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _csv(path: Path, text: str, start: int) -> Iterator[Row]:
    # Line ends as they are: the reader counts them.
    lines = list(io.StringIO(text[start:], newline=""))
    reader = csv.reader(lines, strict=True)
    try:
        columns = tuple(next(reader, ()))
        start, done = start + sum(map(len, lines[: reader.line_num])), reader.line_num
        for cells in reader:
            raw = "".join(lines[done : reader.line_num])
            if cells:
                # What is over was most likely a comma in a text without quotes.
                cells[len(columns) - 1 :] = [",".join(cells[len(columns) - 1 :])]
                value = dict(itertools.zip_longest(columns, cells, fillvalue=""))
                yield Row(reader.line_num, start, raw, value, columns)
            start, done = start + len(raw), reader.line_num
    except csv.Error as error:
        raise InputError(f"{path.name}, line {reader.line_num}: not valid CSV: {error}") from error


def _as_csv(row: Row, value: dict[str, Any]) -> str:
    out = io.StringIO(newline="")
    ended = row.raw[len(row.raw.rstrip("\r\n")) :]
    csv.writer(out, lineterminator=ended).writerow([value.get(column, "") for column in row.columns])
    return out.getvalue()


def _as_json(row: Row, text: str, value: dict[str, Any]) -> str:
    """The value as the row was written: on one line or indented, with spaces or none, escaped or not."""
    escaped = row.raw.isascii() and "\\u" in row.raw
    if "\n" not in row.raw:
        separators = (", ", ": ") if re.search(r'"\s*: ', row.raw) or row.value is None else (",", ":")
        return json.dumps(value, ensure_ascii=escaped, separators=separators)
    ends = "\r\n" if "\r\n" in row.raw else "\n"
    margin = re.match(r"[ \t]*", text[text.rfind("\n", 0, row.start) + 1 :])
    inner = re.match(r"[ \t]*", row.raw.split("\n")[1])
    assert margin is not None and inner is not None
    outer = margin.group()
    unit = inner.group().removeprefix(outer) or "  "
    return json.dumps(value, ensure_ascii=escaped, indent=unit).replace("\n", ends + outer)
