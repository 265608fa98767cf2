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
from edge.backends.onnx_io_binding import Binding, zeros


def tensors(header: OnnxHeader, few: bool) -> dict[str, tuple[str, int]]:
    """The outputs of a run by name, with element type and width: candidates (values, ids), or all logits."""
    if few:
        kinds = (header.cache_type, "int64")
        return {name: (kind, header.candidates) for name, kind in zip(CANDIDATES, kinds, strict=True)}
    return {"logits": (header.cache_type, header.vocab_size)}


class Outputs:
    """Buffers in the system's memory for `rows` outputs of a step's runs."""

    def __init__(self, header: OnnxHeader, *, rows: int) -> None:
        self._narrow = header.cache_type != "float32"
        # By whether they are candidates, and by name.
        self._buffers = {
            few: {name: zeros(rows, width, kind=kind) for name, (kind, width) in tensors(header, few).items()}
            for few in (False, True)
        }

    def bind(self, binding: Binding, at: int, batch: int, picks: int, *, few: bool) -> None:
        """Bind the outputs of a run, `picks` positions of `batch` rows, to the buffers from `at` on."""
        for name, buffer in self._buffers[few].items():
            binding.write(name, buffer, at, (batch, picks, buffer.array.shape[1]))

    def take(self, outputs: Sequence[NDArray[Any]], *, few: bool) -> None:
        """Copy the outputs of a CUDA graph: one position of each row, in the order of `bind`."""
        for array, buffer in zip(outputs, self._buffers[few].values(), strict=True):
            buffer.array[: len(array)] = array

    def read(self, places: Sequence[tuple[int, bool]]) -> StepOutputs:
        """The output at each place (row of the buffers, whether a run wrote candidates there)."""
        if any(few for _, few in places):
            return [self._one(row, few) for row, few in places]
        wanted = [row for row, _ in places]
        logits, first = self._buffers[False]["logits"].array, wanted[0] if wanted else 0
        if wanted == list(range(first, first + len(wanted))):
            return self._single(logits[first : first + len(wanted)])
        return self._single(logits[wanted])

    def _one(self, row: int, few: bool) -> Logits | Candidates:
        first, *ids = (buffer.array[row] for buffer in self._buffers[few].values())
        return Candidates(ids[0], self._single(first)) if few else self._single(first)

    def _single(self, logits: NDArray[Any]) -> Logits:
        return logits.astype(np.float32) if self._narrow else logits
