"""Vectors of texts out of an ONNX model that generates: the mean of its last hidden states.

The graphs that `edge export` makes give these beside the logits. A text is read in pieces over keys and
values of its own, which are given back at once: the slots of running answers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.artefact.onnx_header import HIDDEN, OnnxHeader
from edge.backends.onnx_kv_cache import Rows
from edge.backends.onnx_kv_cache_cuda import DeviceRows
from edge.errors import EdgeError
from edge.machine import hardware

PIECE = 256


class Embedder:
    """session: over a graph with hidden states. options: of its runs. cells: makes one row of cells with
    room for n tokens.
    """

    def __init__(
        self, session: Any, options: Any, header: OnnxHeader, cells: Callable[[int], Rows | DeviceRows]
    ) -> None:
        self._session = session
        self._options = options
        self._header = header
        self._cells: Any = cells

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The mean over `tokens` of the last layer's states, of length 1, [header.hidden].

        Raises EdgeError where the memory does not suffice, or onnxruntime fails.
        """
        header = self._header
        cell = header.block_count * header.head_count_kv * (header.key_length + header.value_length)
        need = 4 * (len(tokens) * cell + 24 * PIECE * header.hidden)
        free = hardware.memory().available
        if need > free:
            raise EdgeError(
                f"embedding {len(tokens)} tokens needs {need / 2**20:,.0f} MiB, "
                f"{free / 2**20:,.0f} MiB are free",
                "send shorter texts, or free some memory",
            )
        try:
            rows = self._cells(len(tokens))
        except Exception as error:  # a device's memory: onnxruntime raises classes of its own
            raise EdgeError(f"no memory for the cells of {len(tokens)} tokens: {error}") from error
        try:
            total = np.zeros(header.hidden, np.float64)
            for at in range(0, len(tokens), PIECE):
                total += self._states(rows, tokens[at : at + PIECE], at).sum(axis=0, dtype=np.float64)
        finally:
            rows.close()
        length = float(np.linalg.norm(total))
        return (total / length if length > 0 else total).astype(np.float32)

    def close(self) -> None:
        """Let go of the session."""
        self._session = self._cells = None

    def _states(self, rows: Rows | DeviceRows, tokens: Sequence[int], at: int) -> NDArray[np.generic]:
        """Hidden states of a piece that stands at position `at`, [tokens, hidden]."""
        ids = np.asarray(tokens, np.int64)
        mask = np.ones(at + len(ids), np.int64)
        states = np.zeros((len(ids), self._header.hidden), self._header.cache_type)
        binding = self._session.io_binding()
        for name, array in (("input_ids", ids), ("attention_mask", mask)):
            binding.bind_input(name, "cpu", 0, np.int64, (1, len(array)), array.ctypes.data)
        binding.bind_output(HIDDEN, "cpu", 0, states.dtype.type, (1, *states.shape), states.ctypes.data)
        rows.bind(binding, 0, 1)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            raise EdgeError(f"onnxruntime failed to embed {len(ids)} tokens: {error}") from error
        return states
