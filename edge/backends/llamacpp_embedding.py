"""Hidden states of a llama.cpp model that generates, for the vectors of texts.

They come from a context of their own over the loaded model, created at the first request and only as large as
the texts are: the context that generates keeps its slots. Both run on the same thread, so that no two steps
share the cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.embedding import check_memory, mean_state
from edge.errors import EdgeError

_BATCH = 512


def filled(parameters: Any, **values: Any) -> Any:
    """A structure of llama.cpp with these fields set. Raises AttributeError for a field that it lacks."""
    for name, value in values.items():
        getattr(parameters, name)
        setattr(parameters, name, value)
    return parameters


class Embedder:
    """lib, model: llama.cpp's bindings and a loaded model. Not thread-safe."""

    def __init__(self, lib: Any, model: Any, *, threads: int, flash_attention: bool) -> None:
        self._lib = lib
        self._model = model
        self._threads = threads
        self._flash_attention = flash_attention
        self._context: Any = None
        self._cells = 0
        self._batch: Any = None
        self.width = int(lib.llama_model_n_embd(model))

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See mean_state. Raises EdgeError where there is no memory for a context of that many tokens."""
        self._reserve(len(tokens))
        try:
            return mean_state(self._states, tokens, _BATCH)
        finally:
            self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), 0, -1, -1)

    def _states(self, tokens: Sequence[int], pos: int) -> NDArray[np.float32]:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = pos + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        if (code := self._lib.llama_decode(self._context, batch)) != 0:
            raise EdgeError(f"llama.cpp failed to embed {len(tokens)} tokens (code {code})")
        pointer = self._lib.llama_get_embeddings(self._context)
        if not pointer:
            raise EdgeError("llama.cpp gives no hidden states of this model")
        states: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (len(tokens), self.width))
        return states

    def _reserve(self, tokens: int) -> None:
        if tokens <= self._cells:
            return
        cells = -(-tokens // _BATCH) * _BATCH
        lib, model = self._lib, self._model
        heads = max(1, lib.llama_model_n_head(model))
        # Keys and values in 16 bits; then a step's hidden states, several times over, in 32.
        cell = 2 * 2 * lib.llama_model_n_layer(model) * lib.llama_model_n_head_kv(model) * self.width // heads
        check_memory(tokens, cells * cell + 4 * _BATCH * self.width * 24)
        self.close()
        params = filled(
            lib.llama_context_default_params(),
            n_ctx=cells,
            n_batch=_BATCH,
            n_ubatch=_BATCH,
            n_outputs_max=_BATCH,
            n_seq_max=1,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            flash_attn_type=int(self._flash_attention),
            embeddings=True,
            # No pooling: llama.cpp would pool each batch by itself.
            pooling_type=lib.LLAMA_POOLING_TYPE_NONE,
            no_perf=True,
        )
        self._context = lib.llama_init_from_model(model, params)
        if not self._context:
            raise EdgeError(f"llama.cpp cannot create a context of {cells} tokens for embeddings")
        self._batch = lib.llama_batch_init(_BATCH, 0, 1)
        self._cells = cells

    def close(self) -> None:
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
        self._context = self._batch = None
        self._cells = 0
