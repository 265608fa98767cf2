"""A GGUF model in several shards, as llama.cpp's gguf-split writes it: name-00001-of-00003.gguf and so on.

The first shard holds the metadata and the number of shards. llama.cpp is given its path and finds the others.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from edge.artefact.gguf_header import GGUFHeader, GGUFTensor, check_model, read_header
from edge.errors import InputError

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def is_later(path: Path) -> bool:
    """Whether the file is, by its name, a shard behind the first, which is not what is loaded."""
    match = _NAME.fullmatch(path.name)
    return match is not None and int(match[2]) > 1


def part_files(path: Path) -> list[Path]:
    """The file itself, or all shards by their names where it is one of several."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return [path]
    return [path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf") for n in range(1, int(match[3]) + 1)]


def read_whole(path: Path) -> GGUFHeader:
    """The header of `path`, with the tensors of all shards where it is the first of several.

    file_size: of all shards. A tensor's offset is from the start of its own file. Raises InputError as
    read_header does for every shard, for one that is missing or of another model, and for a later one; and as
    check_model does for the whole.
    """
    header = read_header(path)
    count = _number(header, "split.count")
    if count > 1:
        header = _with_shards(header, count)
    check_model(header)
    return header


def _with_shards(header: GGUFHeader, count: int) -> GGUFHeader:
    path = header.path
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise InputError(
            f"{path} is one of {count} shards, which its name does not say",
            f"call the shards NAME-00001-of-{count:05d}.gguf and so on",
        )
    files = part_files(path)
    if path != files[0]:
        raise InputError(f"{path} is not the first of its shards", f"give {files[0]}")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of its {count} shards: {', '.join(missing[:3])}",
            "the download is not complete: get them into the same folder",
        )
    tensors: dict[str, GGUFTensor] = {}
    size = 0
    for number, file in enumerate(files):
        shard = header if number == 0 else read_header(file)
        if (_number(shard, "split.no"), _number(shard, "split.count")) != (number, count):
            raise InputError(f"{file} is not shard {number + 1} of {count}", "get the shards again")
        twice = next((name for name in shard.tensors if name in tensors), None)
        if twice is not None:
            raise InputError(f"{file} holds {twice}, which an earlier shard has", "get the shards again")
        tensors |= shard.tensors
        size += shard.file_size
    named = _number(header, "split.tensors.count")
    if named != len(tensors):
        raise InputError(
            f"{path} names {named} tensors, its shards hold {len(tensors)}", "get the shards again"
        )
    return replace(header, tensors=tensors, file_size=size)


def _number(header: GGUFHeader, key: str) -> int:
    value = header.metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise InputError(f"{header.path}: {key} must be a whole number, it is {value!r}", "get it again")
    return value
