"""dataset_info.json and the files beside it: read, mended, and added to."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from edge.artefact import json_file
from edge.errors import InputError
from edge.questions import ANSWERS, QUESTIONS
from edge.ui import rows

INFO = "dataset_info.json"
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
# Of a mapping that the page asks for: LLaMA-Factory's names.
COLUMNS = ("prompt", "query", "response", "system", "history", "chosen", "rejected")
OPENAI = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "system_tag": "system",
}  # fmt: skip
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
# Input methods leave these in place of ASCII.
_WIDE = str.maketrans("“”，：｛｝［］\t", '"",:{}[] ')


def load(folder: Path) -> dict[str, Any]:
    """The data sets of a folder. Raises InputError with line and column where the file is broken."""
    path = folder / INFO
    if not path.is_file():
        return {}
    return parse(path.read_text(encoding="utf-8-sig"), path)


def parse(text: str, path: Path) -> dict[str, Any]:
    """The data sets in the text of `path`. Raises InputError as `load`."""
    value = _parsed(text, path)
    if not isinstance(value, dict):
        raise InputError(f"{path} is not an object of names and data sets")
    return value


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise json_file.invalid(text, error, path) from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid JSON: nested too deeply") from error


def mended(text: str) -> str:
    """The text of a dataset_info.json as JSON: what `_structure` mends, wide and single quotes.

    Raises InputError where that does not suffice.
    """
    text = re.sub(r"^\s*(//|#).*$", "", text.translate(_WIDE), flags=re.MULTILINE)
    try:
        # YAML's flow style is JSON that takes single quotes.
        value = yaml.safe_load(_structure(text))
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError("it cannot be mended by itself: mend the line that is named by hand") from error
    if not isinstance(value, dict):
        raise InputError("it is not an object of names and data sets")
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def mend_rows(path: Path) -> None:
    """Mend a file of rows in place, as `_structure` does; every text in it stays as it is.

    A file of a Chinese Windows becomes UTF-8. Raises InputError for another encoding.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = path.read_text(encoding="gb18030")
        except UnicodeDecodeError as error:
            raise InputError(f"{path.name} is neither UTF-8 nor GB18030", "save it as UTF-8") from error
    if path.suffix == ".jsonl":
        rows = [line.rstrip().rstrip(",，") for line in text.split("\n") if line.strip(" \r\t,，[]")]
        text = "\n".join(map(_structure, rows)) + "\n"
    else:
        text = _structure(text)
        text = f"[{text}]" if text.lstrip().startswith("{") else text
    json_file.write_text(path, text)


def _structure(text: str) -> str:
    """The text with JSON's brackets and commas mended: too many, too few, or wide ones, outside strings."""
    strings: list[str] = []

    def hide(match: re.Match[str]) -> str:
        strings.append(match[0])
        return f'"{len(strings) - 1}"'

    text = _STRING.sub(hide, text.lstrip("\ufeff")).translate(_WIDE)
    # A value at a line's end, and the next key: the comma between them is missing.
    text = re.sub(r'(["}\]\d]|true|false|null)(\s*\n\s*["{])', r"\1,\2", text)
    text = re.sub(r'([}\]])(\s*["{])', r"\1,\2", text)
    text = re.sub(r",(\s*,)+", ",", text)
    for left, right in ("[]", "{}"):
        text += right * (text.count(left) - text.count(right))
    text = re.sub(r",(\s*[}\]])", r"\1", text)
    return _STRING.sub(lambda match: strings[int(match[0][1:-1])], text)


def save(folder: Path, text: str) -> None:
    """Write dataset_info.json, once its text is valid; the earlier one is kept as dataset_info.json.bak."""
    path = folder / INFO
    parse(text, path)
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        shutil.copyfile(path, path.with_name(f"{INFO}.bak"))
    json_file.write_text(path, text)


def add(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Put a data set into dataset_info.json. Raises InputError where that is broken."""
    save(folder, json.dumps({**load(folder), name: entry}, ensure_ascii=False, indent=2) + "\n")


def first_row(path: Path) -> dict[str, Any]:
    """The first row of a file. Raises InputError where it has none."""
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                row: Any = next(csv.DictReader(file), None)
        else:
            text = path.read_text(encoding="utf-8-sig")
            line = next((line for line in text.splitlines() if line.strip()), "")
            row = _parsed(line if path.suffix == ".jsonl" and line else text, Path(path.name))
            row = row[0] if isinstance(row, list) and row else row
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{path.name} has no row with named columns")
    return row


def entry_for(file: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """The entry of a file by its first row; None where its columns say nothing that is known."""
    entry: dict[str, Any] = {"file_name": file}
    keys = set(row)
    pairs = {"chosen", "rejected"} <= keys
    if pairs:
        entry["ranking"] = True
    talk = next((key for key in ("messages", "conversations") if isinstance(row.get(key), list)), None)
    if talk:
        turn: Any = next(iter(row[talk]), None)
        entry |= {"formatting": "sharegpt", "columns": {"messages": talk}}
        if isinstance(turn, dict) and "role" in turn:
            entry["tags"] = OPENAI
        if pairs:
            entry["columns"] |= {"chosen": "chosen", "rejected": "rejected"}
        return entry
    question = next((key for key in QUESTIONS if key in keys), None)
    answer = next((key for key in ANSWERS if key in keys), None)
    flag = next((key for key in ("kto_tag", "label") if isinstance(row.get(key), bool)), None)
    if question is None or (answer is None and not pairs and question != "text"):
        return None
    columns = {"prompt": question}
    columns |= (
        {"chosen": "chosen", "rejected": "rejected"} if pairs else {"response": answer} if answer else {}
    )
    columns |= {"query": "input"} if "input" in keys and question != "input" else {}
    columns |= {key: key for key in ("system", "history", "tools") if key in keys}
    columns |= {"kto_tag": flag} if flag else {}
    return {**entry, "columns": columns}


def free_name(folder: Path, name: str, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """A path for an uploaded file, under its own name or one with a number behind it.

    Raises InputError for a kind of file that is no data.
    """
    plain = Path(re.sub(r"[\x00-\x1f:*?\"<>|]", "_", re.split(r"[/\\]", name)[-1]))
    if plain.suffix.lower() not in suffixes or plain.name.startswith("."):
        raise InputError(f"{name} is no data file", f"there are {', '.join(suffixes)}")
    if plain.name == INFO:
        raise InputError(f"{INFO} is edited below", "paste its text there")
    names = itertools.chain([plain.name], (f"{plain.stem}-{n}{plain.suffix}" for n in itertools.count(2)))
    return next(path for one in names if not (path := folder / one).exists())


def folders(root: Path) -> list[str]:
    """Folders with a dataset_info.json, and `data` in any case."""
    found = {path.parent.name for path in root.glob(f"*/{INFO}")}
    return sorted({"data", *found})


def unlisted(folder: Path, sets: dict[str, Any]) -> list[Path]:
    """Data files in a folder that none of its data sets names."""
    known = {INFO, *(entry.get("file_name") for entry in sets.values() if isinstance(entry, dict))}
    files = (path for path in folder.glob("[!.]*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in files if path.name not in known)


def editable(folder: Path, entry: Any) -> Path | None:
    """The file of a data set whose rows can be edited, or None."""
    path = folder / str(entry.get("file_name", "")) if isinstance(entry, dict) else folder
    return path if path.suffix.lower() in rows.SUFFIXES and path.is_file() else None


def described(entry: Any) -> str:
    """A data set in a few words: its file or hub id, and what its rows are."""
    if not isinstance(entry, dict):
        return "?"
    place = next((str(entry[key]) for key in ("file_name", "hf_hub_url", "ms_hub_url") if key in entry), "?")
    kind = str(entry.get("formatting", "alpaca"))
    return f"{place} · {kind}" + (" · ranking" if entry.get("ranking") else "")
