"""llama.cpp decoding with nothing around it, through llama-cpp-python's low-level bindings: the upper bound.

Greedy (argmax by numpy), one thread, no server. The prompts are read one after the other; then all sequences
advance together, one token each in every llama_decode.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.race import Rates
from bench.measure import roofline
from edge.artefact.gguf_shards import read_whole
from edge.backends.llamacpp import library, native_errors
from edge.backends.llamacpp_embedding import filled
from edge.errors import InputError, UsageError

BATCH = 512


class Model:
    """A GGUF file, loaded once for several settings. gpu: all of its layers on the GPU.

    Raises InputError for a file that llama.cpp cannot load, UnavailableError without the library.
    """

    def __init__(self, path: Path, *, gpu: bool = False) -> None:
        self.footprint = roofline.of_gguf(read_whole(path))
        self.lib = lib = library()
        params = filled(lib.llama_model_default_params(), n_gpu_layers=-1 if gpu else 0)
        with native_errors() as log:
            self.model: Any = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise InputError(f"llama.cpp cannot load {path}: {log.tail()}", "export the file again")
        self.vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model)))

    def close(self) -> None:
        self.lib.llama_model_free(self.model)


@dataclass
class BareLoop:
    """A side of a race: the loop over `model`. cells: KV cells in all; 0 for as many as the streams need.

    memory: with one stream, read the memory right before and after, and give decoding's share of the most
    that it allows.
    """

    model: Model
    threads: int
    flash_attention: bool
    kv_unified: bool
    cells: int = 0
    memory: bool = False
    name: str = "bare llama.cpp loop"

    def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Rates:
        """Make tokens[0] tokens after each prompt. Raises UsageError where the KV cells do not suffice."""
        footprint = self.model.footprint
        if not self.memory or len(prompts) > 1:
            return self._measure(prompts, tokens[0] - 1)
        before = roofline.reading(footprint.probed, self.threads)
        rates = self._measure(prompts, tokens[0] - 1)
        memory = max(before, roofline.reading(footprint.probed, self.threads))
        per_token = footprint.per_token(roofline.context_of([len(prompts[0])], tokens[0] - 1))
        rates.memory_share = (rates.decode or 0.0) / roofline.ceiling(memory, per_token)
        return rates

    def _measure(self, prompts: Sequence[Sequence[int]], steps: int) -> Rates:
        lib, streams, length = self.model.lib, len(prompts), len(prompts[0])
        params = filled(
            lib.llama_context_default_params(),
            # Separate KV buffers have a multiple of 256 cells each.
            n_ctx=self.cells or streams * -(-(length + steps + 1) // 256) * 256,
            n_batch=BATCH,
            n_ubatch=BATCH,
            n_seq_max=streams,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            flash_attn_type=int(self.flash_attention),
            kv_unified=self.kv_unified,
            no_perf=True,
        )
        if params.n_ctx < streams * (length + steps) or length > BATCH:
            raise UsageError(
                f"{params.n_ctx} KV cells do not hold {streams} x {length + steps} tokens, or a prompt has "
                f"more than {BATCH}",
                "raise --ctx, or lower --prompt, --tokens or --streams",
            )
        context = lib.llama_init_from_model(self.model.model, params)
        if not context:
            raise UsageError(f"llama.cpp refuses {params.n_ctx} KV cells", "try a smaller --ctx")
        batch = lib.llama_batch_init(BATCH, 0, 1)
        try:
            began = time.perf_counter()
            last = []
            for stream, prompt in enumerate(prompts):
                rows = [(token, index, stream, index == length - 1) for index, token in enumerate(prompt)]
                last += self._decode(context, batch, rows, 1)
            middle = time.perf_counter()
            for step in range(steps):
                rows = [(last[stream], length + step, stream, True) for stream in range(streams)]
                last = self._decode(context, batch, rows, streams)
            end = time.perf_counter()
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)
        return Rates(
            total=streams * (steps + 1) / (end - began),
            decode=streams * steps / (end - middle),
            prefill=streams * length / (middle - began),
        )

    def _decode(
        self, context: Any, batch: Any, rows: list[tuple[int, int, int, bool]], outputs: int
    ) -> list[int]:
        """One llama_decode of rows (token, position, sequence, whether its logits are wanted).

        Returns the most probable next token of each of the `outputs` rows that want logits.
        """
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        code = self.model.lib.llama_decode(context, batch)
        assert code == 0, f"llama_decode gave {code}"
        pointer = ctypes.cast(self.model.lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        best = np.ctypeslib.as_array(pointer, (outputs, self.model.vocab)).argmax(axis=1)
        return [int(token) for token in best]
