"""JSON objects in files, and what transformers' ones of them hold in two forms."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from edge.errors import InputError

# As Python says it, from 3.13 on.
TRAILING_COMMA = "Illegal trailing comma"
# A reader takes milliseconds.
_TRIES, _PAUSE_S = 20, 0.05


def read(
    path: Path,
    *,
    required: bool = False,
    hint: str = "get the model again",
    types: type[msgspec.Struct] | None = None,
) -> dict[str, Any]:
    """The JSON object in the file; {} where there is none, unless it is required. types: those of its values.

    Raises InputError, with `hint`, for anything else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig")) if required or path.is_file() else {}
        # An escape may be half a surrogate pair, which no library takes as a text.
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", hint) from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object", hint)
    try:
        if types is not None:
            msgspec.convert(data, types)
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}", hint) from error
    return data


def invalid(text: str, error: json.JSONDecodeError, path: Path) -> InputError:
    """What is wrong with the JSON `text` of `path`, with line and column."""
    before = text[: error.pos].rstrip()
    where = f"line {error.lineno}, column {error.colno}"
    if error.msg.startswith(TRAILING_COMMA) or (
        before.endswith(",") and text[error.pos : error.pos + 1] in ("]", "}")
    ):
        return InputError(f"{path}: a comma before the closing bracket ({where})", "remove it")
    return InputError(f"{path}: not valid JSON: {error.msg} ({where})")


def lines(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a text, one a line; others are passed over, for the last may be in part."""
    objects = []
    # splitlines would also split at U+2028, which a text in JSON may hold.
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


def write(path: Path, data: dict[str, Any]) -> None:
    """Write `data` as people read it: indented, and with its characters as they are. As `write_text`."""
    write_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write each of `rows` as a line. As `write_text`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a text with its line ends. Readers see the old file or the new one; nothing in part is left."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """`source.replace(target)`; where a reader holds the target open, as Windows minds, it is waited for."""
    for _ in range(_TRIES):
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(_PAUSE_S)
    source.replace(target)


def token_text(token: Any) -> str:
    """A token in tokenizer_config.json: its text, or an object that holds it; "" for neither."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""
