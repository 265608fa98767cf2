"""Encoded rows kept in a folder (tokenized_path): written by the first run, read by those after it."""

from __future__ import annotations

import dataclasses
from array import array
from pathlib import Path
from typing import Any

import msgspec

from convert.data.encode import Judged, Pair, Sample
from convert.model.chat_format import ChatFormat
from edge.artefact import manifest
from edge.errors import InputError

Item = Sample | Pair | Judged
FILE = "edge_rows.msgpack"


class _Kept(msgspec.Struct):
    """template: digest of the chat template that the rows were encoded with. rows: before packing."""

    template: str
    stage: str
    rows: int
    train: list[dict[str, Any]]
    held: list[dict[str, Any]]


def read(folder: Path, chat: ChatFormat, stage: str) -> tuple[list[Item], list[Item], int] | None:
    """(rows to train on, rows held out, count before packing) of `folder`; None where there is none yet.

    Raises InputError for rows of another template or stage, and for a folder that something else wrote.
    """
    path = folder / FILE
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(
                f"tokenized_path: {folder} was not written by edge train",
                "give another folder; 100,000 rows are encoded in 20 s",
            )
        return None
    try:
        kept = msgspec.msgpack.decode(path.read_bytes(), type=_Kept)
        train, held = ([_item(one) for one in part] for part in (kept.train, kept.held))
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", "remove it: it is written anew") from error
    if (kept.template, kept.stage) != (_template(chat), stage):
        raise InputError(
            f"tokenized_path: {folder} holds rows of another chat template or stage",
            "remove it, or give another folder",
        )
    return train, held, kept.rows


def write(
    folder: Path, chat: ChatFormat, stage: str, *, train: list[Item], held: list[Item], rows: int
) -> None:
    """Keep what `read` gives in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = _Kept(_template(chat), stage, rows, [_plain(one) for one in train], [_plain(one) for one in held])
    partial = folder / f".{FILE}.partial"
    partial.write_bytes(msgspec.msgpack.encode(kept, enc_hook=list))
    partial.replace(folder / FILE)


def _template(chat: ChatFormat) -> str:
    return str(manifest.text_digest(chat.source))


def _plain(item: Item) -> dict[str, Any]:
    parts = {entry.name: getattr(item, entry.name) for entry in dataclasses.fields(item)}
    return {
        "kind": type(item).__name__,
        **{name: _plain(part) if isinstance(part, Sample) else part for name, part in parts.items()},
    }


def _item(given: dict[str, Any]) -> Any:
    kind = {"Sample": Sample, "Pair": Pair, "Judged": Judged}[given.pop("kind")]
    parts = {name: _item(part) if isinstance(part, dict) else part for name, part in given.items()}
    if kind is Sample:
        spans = tuple((start, end) for start, end in parts["spans"])
        parts |= {"ids": array("i", parts["ids"]), "spans": spans, "starts": tuple(parts["starts"])}
    return kind(**parts)
