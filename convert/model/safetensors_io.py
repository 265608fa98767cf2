"""Safetensors: which file holds what, and new ones written a few rows at a time.

Their shapes are known before, so the header goes first and no shard is held in memory.

Format: github.com/huggingface/safetensors, "Format". Files are named as transformers names them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from convert.model.hf_folder import INDEX, SHARD
from edge.artefact import json_file
from edge.progress import counted

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)


# A part -> its rows from the first to the last, some at a time.
Rows = Callable[[Part], Iterable[torch.Tensor]]


def write(folder: Path, parts: list[Part], rows: Rows, largest: int = SHARD) -> None:
    """Write the parts, in their order, as the shards of a model, with their index where there are several.

    largest: bytes of a file at most, if no single tensor is larger.
    """
    shards = _split(parts, largest)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else "model.safetensors"
        _write(folder / name, shard, rows)
        where.update(dict.fromkeys((part.name for part in shard), name))
    if len(shards) > 1:
        write_index(folder, where, sum(part.bytes for part in parts))


def write_index(folder: Path, where: dict[str, str], size: int) -> None:
    """Say which of the folder's files holds each tensor. size: bytes of all tensors."""
    json_file.write(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _split(parts: list[Part], largest: int) -> list[list[Part]]:
    shards: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        if shards[-1] and filled + part.bytes > largest:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += part.bytes
    return shards


def _write(path: Path, parts: list[Part], rows: Rows) -> None:
    names = {dtype: name for name, dtype in TYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        begin, end = end, end + part.bytes
        header[part.name] = {
            "dtype": names[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in counted(parts, "tensors"):
            begin = file.tell()
            for some in rows(part):
                assert some.dtype == part.dtype
                file.write(memoryview(some.contiguous().reshape(-1).view(torch.uint8).numpy()))
            assert file.tell() - begin == part.bytes, f"{part.name}: more or fewer rows than its shape"
