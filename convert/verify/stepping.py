"""Logits and greedy texts of one sequence from a serving backend, stepped as a server steps it."""

from __future__ import annotations

import numpy as np

from edge.backends.base import Backend, Logits, Row

# Tokens that are read in one step; every backend gives as many logits at once.
CHUNK = 64


def logits(backend: Backend, ids: list[int], last: int) -> Logits:
    """Logits after the `last` tokens of `ids`, float32 (last, vocabulary). Slot 0 holds `ids` afterwards."""
    backend.truncate(0, 0)
    parts = []
    for begin in range(0, len(ids), CHUNK):
        chunk = ids[begin : begin + CHUNK]
        wanted = min(len(chunk), max(0, begin + len(chunk) - len(ids) + last))
        output = backend.step([Row(0, begin, chunk, wanted)])
        if wanted:
            # The backend writes its next step's logits into the same memory.
            parts.append(np.array(output, np.float32))
    return np.concatenate(parts)


def greedy(backend: Backend, ids: list[int], count: int, ends: frozenset[int]) -> list[int]:
    """At most `count` most probable next tokens, one of `ends` included."""
    tokens = [int(logits(backend, ids, 1)[0].argmax())]
    while len(tokens) < count and tokens[-1] not in ends:
        output = backend.step([Row(0, len(ids) + len(tokens) - 1, tokens[-1:], 1)])
        tokens.append(int(np.asarray(output)[0].argmax()))
    return tokens
