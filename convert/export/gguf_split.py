"""One GGUF in several files, named as llama.cpp's own gguf-split names them; it loads them by the first."""

from __future__ import annotations

import re
from pathlib import Path

from edge.errors import InputError, UsageError


def parse_size(given: str) -> int:
    """Bytes of a size such as 500M or 2G, in powers of ten. Raises UsageError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)([MG])", given.strip().upper())
    if not match:
        raise UsageError(f"--split-max-size {given}: no such size", "give one as 500M or 2G")
    return int(match[1]) * {"M": 10**6, "G": 10**9}[match[2]]


def split(path: Path, most: int) -> Path:
    """Put `path` into files of at most `most` bytes of tensors, in its place; the first one's path.

    A file that is small enough stays as it is. Raises InputError for a tensor that is larger than a file.
    """
    if not _write_parts(path, most):
        return path
    path.unlink()
    return min(path.parent.glob(f"{path.stem}-*-of-*.gguf"))


def _write_parts(path: Path, most: int) -> bool:
    """Write the parts beside `path`; False where it is small enough. Its mapping ends with this function."""
    import gguf

    reader = gguf.GGUFReader(path)
    largest = max(reader.tensors, key=lambda tensor: tensor.n_bytes)
    if largest.n_bytes > most:
        raise InputError(
            f"{path.name}: {largest.name} alone has {int(largest.n_bytes):,} bytes, more than a file",
            "give a larger --split-max-size",
        )
    if sum(int(tensor.n_bytes) for tensor in reader.tensors) <= most:
        return False
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(path), architecture, split_max_size=most)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        items = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=items)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return True
