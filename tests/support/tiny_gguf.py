"""A writer of small GGUF files, right or damaged, for the tests."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from edge.artefact.gguf_header import GGML_TYPES, GGUFArray, read_header


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item) if item < 2**32 else struct.pack("<IQ", 10, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    if item and isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
    if item and isinstance(item[0], float):
        return struct.pack(f"<IIQ{len(item)}f", 9, 6, len(item), *item)
    return struct.pack(f"<IIQ{len(item)}i", 9, 5, len(item), *item)


def shape(architecture: str) -> dict[str, Any]:
    """The metadata of a model of one layer and one token, whose only tensor is ONE_TENSOR."""
    names = ("context_length", "embedding_length", "block_count", "attention.head_count")
    counts = {f"{architecture}.{name}": 1 for name in names}
    return {"general.architecture": architecture, **counts, "tokenizer.ggml.tokens": ["a"]}


ONE_TENSOR = [("token_embd.weight", (1, 1), 0, 0)]


def gguf(
    metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], int, int]], data: int = 0
) -> bytes:
    """A version 3 file. A tensor is (name, shape, ggml type, offset); `data` bytes follow the header."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    out += b"".join(text(key) + value(item) for key, item in metadata.items())
    for name, shape, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + b"\0" * (-len(out) % 32) + b"\x01" * data


class Parts:
    """A GGUF file taken apart. header: its bytes before the tensors' `data`; tensors: as `gguf` has them."""

    def __init__(self, path: Path) -> None:
        read = read_header(path)
        start = min(tensor.offset for tensor in read.tensors.values())
        whole = path.read_bytes()
        self.header, self.data = whole[:start], whole[start:]
        self.metadata: dict[str, Any] = {
            key: item.values() if isinstance(item, GGUFArray) else item for key, item in read.metadata.items()
        }
        numbers = {name: number for number, (name, _, _) in GGML_TYPES.items()}
        self.tensors = [
            (tensor.name, tensor.shape, numbers[tensor.type], tensor.offset - start)
            for tensor in read.tensors.values()
        ]

    def changed(self, **metadata: Any) -> bytes:
        """The file with other metadata; `__` in a name stands for a dot, None for nothing."""
        changes = {name.replace("__", "."): item for name, item in metadata.items()}
        kept = {key: item for key, item in (self.metadata | changes).items() if item is not None}
        return gguf(kept, self.tensors) + self.data
