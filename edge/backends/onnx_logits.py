"""The outputs of a run of an ONNX model: logits of chosen positions, or only the largest ones with their ids.

On a GPU most of what a step copies is a vocabulary of logits for each row. A graph with a TopK at its end
gives 64 candidates instead, and most requests are sampled from no more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.artefact.onnx_header import CANDIDATES, OnnxHeader
from edge.backends.base import Candidates, Logits, StepOutputs
from edge.backends.onnx_io_binding import Binding, Buffer, zeros


class Outputs:
    """Buffers in the system's memory for `rows` outputs of a step's runs."""

    def __init__(self, header: OnnxHeader, *, rows: int) -> None:
        count = header.candidates
        self._narrow = header.cache_type != "float32"
        self._logits = zeros(rows, header.vocab_size, kind=header.cache_type)
        self._values = zeros(rows if count else 0, count, kind=header.cache_type)
        self._ids = zeros(rows if count else 0, count)

    def bind(self, binding: Binding, at: int, batch: int, picks: int, *, few: bool) -> None:
        """Bind the outputs of a run, `picks` positions of `batch` rows, to the buffers from `at` on."""
        for name, buffer in self._of(few).items():
            binding.write(name, buffer, at, (batch, picks, buffer.array.shape[1]))

    def take(self, outputs: Sequence[NDArray[Any]], *, few: bool) -> None:
        """Copy the outputs of a CUDA graph: one position of each row, in the order of `bind`."""
        for array, buffer in zip(outputs, self._of(few).values(), strict=True):
            buffer.array[: len(array)] = array

    def _of(self, few: bool) -> dict[str, Buffer]:
        """The graph's outputs by name: candidates, or all logits."""
        if few:
            return dict(zip(CANDIDATES, (self._values, self._ids), strict=True))
        return {"logits": self._logits}

    def read(self, places: Sequence[tuple[int, bool]]) -> StepOutputs:
        """The output at each place (row of the buffers, whether a run wrote candidates there)."""
        if any(few for _, few in places):
            return [self._one(row, few) for row, few in places]
        wanted = [row for row, _ in places]
        first = wanted[0] if wanted else 0
        if wanted == list(range(first, first + len(wanted))):
            return self._single(self._logits.array[first : first + len(wanted)])
        return self._single(self._logits.array[wanted])

    def _one(self, row: int, few: bool) -> Logits | Candidates:
        if few:
            return Candidates(self._ids.array[row], self._single(self._values.array[row]))
        return self._single(self._logits.array[row])

    def _single(self, logits: NDArray[Any]) -> Logits:
        return logits.astype(np.float32) if self._narrow else logits
