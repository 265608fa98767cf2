"""A safetensors file with one tensor, for tests that need a whole file and no model."""

from __future__ import annotations

import json
from pathlib import Path


def safetensors(path: Path, data: bytes = b"\x00\x00\x80?", empty: int = 0) -> Path:
    """One F32 tensor `w`, and `empty` ones without an element."""
    sizes = {"w": len(data)} | {f"e{n}": 0 for n in range(empty)}
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(data) - size, len(data)]}
            for name, size in sizes.items()
        }
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path
