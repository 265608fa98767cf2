"""Rows out of data files, one after the other: json, jsonl, csv, parquet and txt, a file or a folder of them.

A file is never held whole: a list in a .json file of any size is taken apart object by object.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.model.hf_folder import shell
from edge.artefact import json_file
from edge.errors import InputError, UnavailableError
from edge.setup import install_command

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_CHUNK = 2**20
_BLANK = re.compile(r"[ \t\r\n]*")


class BadRow(Exception):
    """Why a row cannot be used."""


class Twice(dict[str, Any]):
    """A JSON object in which a key stands twice."""

    key = ""


def read(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of each row; in .jsonl, .csv and .txt the line. A BadRow stands for a bad one.

    A line of .txt is a row {"text": line}, as LLaMA-Factory has it.

    Raises InputError where the file is missing, empty, no UTF-8 or of another kind.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}", "check file_name in dataset_info.json")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: only {', '.join(SUFFIXES)} are read", "convert it to one of these")
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        # utf-8-sig: editors on Windows begin a file with a byte-order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix == ".csv":
                yield from _csv(file, path)
                return
            if suffix == ".txt":
                yield from _texts(file, path)
                return
            buffer = _Buffer(file, path)
            if not buffer.skip():
                raise InputError(f"{path} is empty")
            if buffer.text.startswith("\0") or buffer.text[1:2] == "\0":
                raise no_utf8(path)  # UTF-16 without a mark
            if buffer.text[buffer.at] == "[":
                yield from _list(buffer)
                return
            file.seek(0)
            yield from _lines(file, path, whole=suffix == ".json")
    except UnicodeDecodeError as error:
        raise no_utf8(path, error) from error


def no_utf8(path: Path, error: UnicodeDecodeError | None = None) -> InputError:
    """What a text file that is no UTF-8 is by its bytes, and the command that converts it.

    It is not read as what it looks like: bytes that are no GB18030 often make some in which all is wrong.
    """
    encoding = ""
    with path.open("rb") as file:
        head = file.read(2)
        if head in (b"\xff\xfe", b"\xfe\xff"):
            encoding = "utf-16"
        elif b"\0" in head:
            encoding = "utf-16-be" if head.startswith(b"\0") else "utf-16-le"
        else:
            decoder, data = codecs.getincrementaldecoder("gb18030")(), head
            with contextlib.suppress(UnicodeDecodeError):
                while data:
                    decoder.decode(data)
                    data = file.read(_CHUNK)
                decoder.decode(b"", final=True)
                encoding = "gb18030"
    if not encoding:
        return InputError(f"{path} is not UTF-8: {error}", "save it as UTF-8")
    code = (
        "import sys, pathlib; a, b, e = sys.argv[1:]; a, b = map(pathlib.Path, (a, b)); "
        "b.write_bytes(a.read_bytes().decode(e).encode())"
    )
    target = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return InputError(
        f"{path} is not UTF-8, but by its bytes {encoding.upper()}",
        f'convert it, and use what comes out: python -c "{code}" {shell(path)} {shell(target)} {encoding}',
    )


def files(path: Path) -> list[Path]:
    """`path` itself, or the data files in the folder `path`, by name. Raises InputError for none."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    # A README.txt beside the data is none of it.
    files = [file for file in files if file.suffix.lower() != ".txt"] or files
    if not files:
        raise InputError(
            f"{path} holds none of {', '.join(SUFFIXES)}", "check file_name in dataset_info.json"
        )
    return files


def parse(text: str, path: Path) -> Any:
    """A whole JSON text. Raises InputError with line and column."""
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except json.JSONDecodeError as error:
        raise json_file.invalid(text, error, path) from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid JSON: nested too deeply") from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    twice = Twice(values)
    twice.key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return twice


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


class _Buffer:
    """A window that moves over a text file. at: index in `text` of what is next. line, column: its start."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self.path = file, path
        self.text, self.at, self.ended = "", 0, False
        self._line, self._column = 0, 0

    def more(self) -> bool:
        """Read on, at least as much as is left; False at the end of the file."""
        done, left = self.text[: self.at], self.text[self.at :]
        self._line += done.count("\n")
        self._column = len(done) - done.rfind("\n") - 1 if "\n" in done else self._column + len(done)
        new = "" if self.ended else self._file.read(max(_CHUNK, len(left)))
        self.ended = not new
        self.text, self.at = left + new, 0
        return bool(new)

    def skip(self) -> bool:
        """Pass blanks; False at the end of the file."""
        while True:
            self.at = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return True
            if not self.more():
                return False

    def wrong(self, error: json.JSONDecodeError) -> InputError:
        """`error`, which is about `text`, with its place in the file."""
        moved = json.JSONDecodeError(error.msg, self.text, error.pos)
        moved.colno += self._column if moved.lineno == 1 else 0
        moved.lineno += self._line
        return json_file.invalid(self.text, moved, self.path)


def _list(buffer: _Buffer) -> Iterator[tuple[int, Any]]:
    """The values of a JSON list that begins at the buffer's place."""
    buffer.at += 1
    number = 0
    while buffer.skip():
        if buffer.text[buffer.at] == "]":
            if number == 0:
                break
            raise buffer.wrong(json.JSONDecodeError(json_file.TRAILING_COMMA, buffer.text, buffer.at))
        number += 1
        yield number, _value(buffer)
        if not buffer.skip():
            break
        sign = buffer.text[buffer.at]
        if sign not in ",]":
            raise buffer.wrong(json.JSONDecodeError("Expecting ',' delimiter", buffer.text, buffer.at))
        buffer.at += 1
        if sign == "]":
            if buffer.skip():
                raise buffer.wrong(json.JSONDecodeError("Extra data", buffer.text, buffer.at))
            return
    if number == 0 and buffer.at < len(buffer.text):
        return
    raise InputError(
        f"{buffer.path} is cut off: its list has no end, after {number} rows", "get the file again"
    )


def _value(buffer: _Buffer) -> Any:
    while True:
        try:
            value, end = _DECODER.raw_decode(buffer.text, buffer.at)
        except json.JSONDecodeError as error:
            if buffer.ended:
                raise buffer.wrong(error) from error
            buffer.more()  # perhaps it is only cut by the end of what was read so far
            continue
        except RecursionError as error:
            raise InputError(f"{buffer.path}: not valid JSON: nested too deeply") from error
        # A number may go on behind the end of what was read.
        if end < len(buffer.text) or not buffer.more():
            buffer.at = min(end, len(buffer.text))
            return value


def _lines(file: Any, path: Path, *, whole: bool) -> Iterator[tuple[int, Any]]:
    """One JSON text a line. whole: a .json file, where bad lines alone mean that it is no list of lines."""
    bad: list[tuple[int, BadRow]] = []
    good = False
    # Not splitlines: U+2028 and its like may stand inside a JSON text; newline="" leaves them alone.
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = parse(line, path)
        except InputError as error:
            row = (number, BadRow(error.message.removeprefix(f"{path}: ")))
            if whole and not good and len(bad) < 100:
                bad.append(row)
            else:
                yield row
            continue
        yield from bad
        bad.clear()
        good = True
        yield number, value
    if bad:
        # One object over several lines, not one object a line: say what is wrong with the whole.
        raise InputError(f"{path} is not a list of rows", "put the rows into [ ... ], or one object a line")


def _texts(file: Any, path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}
    if not number:
        raise InputError(f"{path} is empty")


def _csv(file: Any, path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(file, strict=True)
    try:
        if not reader.fieldnames:
            raise InputError(f"{path} is empty")
        for row in reader:
            if None in row or None in row.values():
                width = len(reader.fieldnames)
                yield (
                    reader.line_num,
                    BadRow(f"has another number of fields than the {width} of the first line"),
                )
            else:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.reader.line_num}: not valid CSV: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{path} needs the package 'pyarrow'", install_command("train")) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=512):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        (row,) = batch.slice(index, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        row = BadRow(f"is not UTF-8: {error}")
                    yield number, row
    except arrow.ArrowException as error:
        raise InputError(
            f"{path} cannot be read: {str(error).splitlines()[0]}", "get the file again"
        ) from error
