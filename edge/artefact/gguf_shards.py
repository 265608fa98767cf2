"""A GGUF model in several files, as llama.cpp's gguf-split leaves it: name-00001-of-00003.gguf and so on.

The first file says how many there are and holds the metadata; llama.cpp is given its path and finds the
others.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from edge.artefact.gguf_header import GGUFHeader, GGUFTensor, read_header
from edge.errors import InputError

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def is_later(path: Path) -> bool:
    """Whether the file is by its name a part behind the first: not what is loaded."""
    found = _NAME.fullmatch(path.name)
    return found is not None and int(found[2]) > 1


def part_files(path: Path) -> list[Path]:
    """The file, or all parts by their names where it is the first of several."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        return [path]
    return [path.with_name(f"{found[1]}-{n:05d}-of-{found[3]}.gguf") for n in range(1, int(found[3]) + 1)]


def read_whole(path: Path) -> GGUFHeader:
    """The header of `path`, with the tensors of all parts where it is the first of several.

    file_size is that of all; a tensor's offset is from the start of its own file. Raises InputError as
    read_header does for every part, for one that is missing or another file's, and for a later one.
    """
    header = read_header(path)
    count = _number(header, "split.count")
    if count <= 1:
        return header
    found = _NAME.fullmatch(path.name)
    if found is None or int(found[3]) != count:
        raise InputError(
            f"{path} is one of {count} parts, which its name does not say",
            f"call the parts NAME-00001-of-{count:05d}.gguf and so on",
        )
    files = part_files(path)
    if path != files[0]:
        raise InputError(f"{path} is not the first of its parts", f"give {files[0]}")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of its {count} parts: {', '.join(missing[:3])}",
            "the download is not complete: get them into the same folder",
        )
    tensors: dict[str, GGUFTensor] = {}
    size = 0
    for number, file in enumerate(files):
        part = header if number == 0 else read_header(file)
        if (_number(part, "split.no"), _number(part, "split.count")) != (number, count):
            raise InputError(f"{file} is not part {number + 1} of {count}", "get the parts again")
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise InputError(f"{file} holds {twice}, which an earlier part has", "get the parts again")
        tensors |= part.tensors
        size += part.file_size
    told = _number(header, "split.tensors.count")
    if told != len(tensors):
        raise InputError(f"{path} names {told} tensors, its parts hold {len(tensors)}", "get the parts again")
    return replace(header, tensors=tensors, file_size=size)


def _number(header: GGUFHeader, key: str) -> int:
    value = header.metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise InputError(f"{header.path}: {key} must be a whole number, it is {value!r}", "get it again")
    return value
