"""A safetensors file with one tensor, for tests that need a whole file and no model."""

from __future__ import annotations

import json
from pathlib import Path


def safetensors(path: Path, data: bytes = b"\x00\x00\x80?") -> Path:
    """One F32 tensor `w`."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [len(data) // 4], "data_offsets": [0, len(data)]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path
