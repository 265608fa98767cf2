"""What a run of an ONNX model gives: logits of chosen positions, or the few largest of them with their ids.

Where the model computes on a card, a vocabulary of logits for each row is what a step copies most of; a graph
with a TopK at its end gives 64 candidates instead, and most requests are sampled from no more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge.backends.base import Logits
from edge.backends.onnx_binding import Binding, zeros
from edge.onnx_header import CANDIDATES, OnnxHeader


class Outputs:
    """Buffers in the processor's memory for `rows` rows of a step's runs; `outputs` of them are asked for."""

    def __init__(self, header: OnnxHeader, *, rows: int, outputs: int) -> None:
        count = header.candidates
        self._logits = zeros(rows, header.vocab_size, kind=header.cache_type)
        self._values = zeros(rows if count else 0, count, kind=header.cache_type)
        self._ids = zeros(rows if count else 0, count)
        # What is not a candidate is -inf, and stays so: only what was written is cleared again.
        self._spread = np.full((outputs if count else 0, header.vocab_size), -np.inf, np.float32)
        self._written: list[tuple[int, Any]] = []

    def bind(self, binding: Binding, at: int, batch: int, picks: int, *, few: bool) -> None:
        """Let a run over `batch` rows write what its `picks` positions of each give, from row `at` on."""
        for name, buffer in (
            zip(CANDIDATES, (self._values, self._ids), strict=True) if few else (("logits", self._logits),)
        ):
            binding.write(name, buffer, at, (batch, picks, buffer.array.shape[1]))

    def read(self, places: Sequence[tuple[int, bool]]) -> Logits:
        """Float32 logits of each place: a row, and whether a run wrote candidates there. To be written into
        by the caller, who raises no -inf.
        """
        if any(few for _, few in places):
            return self._mixed(places)
        wanted = [row for row, _ in places]
        first = wanted[0] if wanted else 0
        found = (
            self._logits.array[first : first + len(wanted)]
            if wanted == list(range(first, first + len(wanted)))
            else self._logits.array[wanted]
        )
        logits: Logits = found if found.dtype == np.float32 else found.astype(np.float32)
        return logits

    def _mixed(self, places: Sequence[tuple[int, bool]]) -> Logits:
        for at, gone in self._written:
            self._spread[at, gone] = -np.inf
        self._written.clear()
        for at, (row, few) in enumerate(places):
            where: Any = self._ids.array[row].copy() if few else slice(None)
            self._spread[at, where] = self._values.array[row] if few else self._logits.array[row]
            self._written.append((at, where))
        return self._spread[: len(places)]
