"""What the process that renders chat templates and the one that asks agree on: bounds, and JSON in frames."""

from __future__ import annotations

import json
from typing import IO, Any

# Bytes that the rendering process may take, and seconds for one prompt.
MEMORY = 512 * 2**20
RENDER_S = 1.0


def frame(value: Any) -> bytes:
    """`value` as JSON behind its length.

    Raises TypeError, ValueError or RecursionError for what JSON cannot say.
    """
    body = json.dumps(value).encode("ascii")
    return len(body).to_bytes(4, "big") + body


def read_frame(stream: IO[bytes]) -> Any:
    """The value of the next frame; None where the stream has ended."""
    head = stream.read(4)
    size = int.from_bytes(head, "big") if len(head) == 4 else 0
    body = stream.read(size)
    return json.loads(body) if size and len(body) == size else None
