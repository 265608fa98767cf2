"""Hidden states of an ONNX model that generates, for the vectors of texts.

The graphs that `edge export` makes output these beside the logits. A text is read in pieces over a KV buffer
of its own, which is freed at once: the slots of running requests stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.artefact.onnx_header import HIDDEN, OnnxHeader
from edge.backends.embedding import check_memory, mean_state
from edge.backends.onnx_kv_cache import KVCache
from edge.errors import EdgeError

PIECE = 256


class Embedder:
    """session: over a graph with hidden states. options: of its runs. new_cache: a KV buffer for n tokens."""

    def __init__(
        self, session: Any, options: Any, header: OnnxHeader, new_cache: Callable[[int], KVCache]
    ) -> None:
        self._session = session
        self._options = options
        self._header = header
        self._new_cache: Any = new_cache

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See mean_state. Raises EdgeError where the memory does not suffice, or onnxruntime fails."""
        header = self._header
        cell = header.block_count * header.head_count_kv * (header.key_length + header.value_length)
        check_memory(len(tokens), 4 * (len(tokens) * cell + 24 * PIECE * header.hidden))
        try:
            cache = self._new_cache(len(tokens))
        except Exception as error:  # a device's memory: onnxruntime raises classes of its own
            raise EdgeError(f"no memory for the KV cells of {len(tokens)} tokens: {error}") from error
        try:
            return mean_state(lambda piece, pos: self._states(cache, piece, pos), tokens, PIECE)
        finally:
            cache.close()

    def close(self) -> None:
        """Release the session."""
        self._session = self._new_cache = None

    def _states(self, cache: KVCache, tokens: Sequence[int], pos: int) -> NDArray[Any]:
        """Hidden states of a piece that begins at position `pos`, [tokens, hidden]."""
        ids = np.asarray(tokens, np.int64)
        mask = np.ones(pos + len(ids), np.int64)
        states = np.zeros((len(ids), self._header.hidden), self._header.cache_type)
        binding = self._session.io_binding()
        for name, array in (("input_ids", ids), ("attention_mask", mask)):
            binding.bind_input(name, "cpu", 0, np.int64, (1, len(array)), array.ctypes.data)
        binding.bind_output(HIDDEN, "cpu", 0, states.dtype.type, (1, *states.shape), states.ctypes.data)
        cache.bind(binding, 0, 1)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            raise EdgeError(f"onnxruntime failed to embed {len(ids)} tokens: {error}") from error
        return states
