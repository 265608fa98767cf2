"""Decoding steps on a CUDA card as recordings: one launch in place of a kernel after the other.

A step of a small model launches some thousand kernels, and launching them takes longer than what they do. A
recording (onnxruntime's CUDA graph) does what a run did, at the same addresses and of the same shape. So its
inputs and outputs lie in memory of its own on the card, the rows of the batch are made up to a power of two,
and the mask to a length that holds for many steps. onnxruntime never gives a recording back: there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.artefact.onnx_header import CANDIDATES, OUTPUT_POSITIONS, OnnxHeader
from edge.backends.onnx_kv_cache_cuda import DeviceRows

# Steps of one shape before it is recorded, which takes about as long as some of them.
_AFTER = 8
_MOST = 32
_LEAST_WIDTH = 256
# The run option that says which recording a run is; -1 is none.
GRAPH = "gpu_graph_id"


def span(first: int, count: int, slots: int) -> tuple[int, int]:
    """The rows (first, count) that are run for those asked for: a power of two of them, or all."""
    whole = min(1 << (count - 1).bit_length(), slots)
    return min(first, slots - whole), whole


def width(longest: int, context: int) -> int:
    """The length of the mask that is run for rows of up to `longest` tokens."""
    return min(max(_LEAST_WIDTH, 1 << (longest - 1).bit_length()), context)


class Recording:
    """A step of `count` rows from `first` on, with up to `longest` tokens each; recorded at its first run."""

    def __init__(
        self,
        runtime: Any,
        session: Any,
        rows: DeviceRows,
        header: OnnxHeader,
        first: int,
        count: int,
        longest: int,
        few: bool,
        *,
        number: int,
    ) -> None:
        device, self._session = rows.device, session
        self.first, self.count = first, count
        self.made = False
        allot = runtime.OrtValue.ortvalue_from_shape_and_type
        self._ids = allot((count, 1), np.int64, device, 0)
        self._mask = allot((count, longest), np.int64, device, 0)
        # Bound below, and kept alive here.
        self._position = runtime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.int64), device, 0)
        kind = rows.dtype.type
        if few:
            shape = (count, 1, header.candidates)
            outputs = {
                CANDIDATES[0]: allot(shape, kind, device, 0),
                CANDIDATES[1]: allot(shape, np.int64, device, 0),
            }
        else:
            outputs = {"logits": allot((count, 1, header.vocab_size), kind, device, 0)}
        self._outputs = list(outputs.values())
        self._order = np.arange(longest, dtype=np.int64)
        self._binding = session.io_binding()
        inputs = {"input_ids": self._ids, "attention_mask": self._mask, OUTPUT_POSITIONS: self._position}
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        rows.bind(self._binding, first, count)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options = runtime.RunOptions()
        self._options.add_run_config_entry(GRAPH, str(number))

    def run(self, ids: NDArray[np.int64], totals: Sequence[int]) -> list[NDArray[Any]]:
        """ids [count]; totals: tokens of each row then. The outputs, [count, ...] each, on the host."""
        self._ids.update_inplace(ids[:, None])
        self._mask.update_inplace((self._order < np.array(totals)[:, None]).astype(np.int64))
        self._session.run_with_iobinding(self._binding, self._options)
        self.made = True
        return [value.numpy()[:, 0] for value in self._outputs]


class Recorder:
    """Recordings of a session that was made to have them, by the steps that come often."""

    def __init__(
        self, runtime: Any, session: Any, rows: DeviceRows, header: OnnxHeader, *, slots: int, context: int
    ) -> None:
        self._parts = (runtime, session, rows, header)
        self._slots, self._context = slots, context
        self._seen: dict[tuple[int, int, int, bool], int] = {}
        self._made: dict[tuple[int, int, int, bool], Recording] = {}

    def find(
        self, first: int, count: int, few: bool, totals: Callable[[int, int], list[int]]
    ) -> Recording | None:
        """A recording that holds the `count` rows from `first` on; None while steps of its shape are rare.

        totals: tokens of each row of a span then. Every row of it needs room for them.
        """
        first, count = span(first, count, self._slots)
        longest = max(totals(first, count))
        if longest > self._context:
            return None
        key = first, count, width(longest, self._context), few
        if key not in self._made:
            seen = self._seen[key] = self._seen.get(key, 0) + 1
            if seen <= _AFTER or len(self._made) == _MOST:
                return None
            self._made[key] = Recording(*self._parts, *key, number=len(self._made) + 1)
        return self._made[key]
