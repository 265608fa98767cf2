"""JSON objects in files, and what transformers' ones of them hold in two forms."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from edge.errors import InputError


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
    """Write `data` as people read it: indented, and with its characters as they are.

    Readers see the old file or the new one.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def token_text(token: Any) -> str:
    """A token in tokenizer_config.json: its text, or an object that holds it; "" for neither."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""
