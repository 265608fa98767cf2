"""The vector of a text: the mean of a generating model's last hidden states. Shared by the backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import EdgeError
from edge.machine import hardware


def mean_state(
    states: Callable[[Sequence[int], int], NDArray[Any]], tokens: Sequence[int], piece: int
) -> NDArray[np.float32]:
    """The mean over `tokens` of the last layer's output, scaled to length 1. [width]

    states: hidden states of a piece that begins at a position, [tokens, width]. piece: tokens of one call.
    """
    total = sum(
        states(tokens[pos : pos + piece], pos).sum(axis=0, dtype=np.float64)
        for pos in range(0, len(tokens), piece)
    )
    length = float(np.linalg.norm(total))
    return np.asarray(total / length if length > 0 else total, np.float32)


def check_memory(tokens: int, need: int) -> None:
    """Raise EdgeError unless `need` bytes are free for embedding `tokens` tokens."""
    memory = hardware.memory()
    if need > memory.available:
        raise EdgeError(
            f"embedding {tokens} tokens needs {need / 2**20:,.0f} MiB, "
            f"{memory.available / 2**20:,.0f} MiB are free{memory.within}",
            "send shorter texts, or free some memory",
        )
