"""llama.cpp through llama-cpp-python's low-level bindings, one step at a time.

Whatever would make the native code end the process is refused in Python first (see edge.backends.base).
The KV cache is either unified, for all slots, or a buffer for each slot.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.artefact.gguf_shards import part_files
from edge.backends import base, linux_memory
from edge.backends.base import FULL, Backend, BackendInfo, Cells, Logits, Row, StepInterrupted, check_rows
from edge.backends.llamacpp_embedding import Embedder, filled
from edge.backends.llamacpp_threads import ThreadController
from edge.backends.llamacpp_vocabulary import Vocabulary
from edge.errors import EdgeError, InputError, UnavailableError, UsageError
from edge.machine import build_llamacpp
from edge.machine.build_check import load_backends
from edge.machine.llamacpp_source import BUILD

# Shorter steps end soon enough by themselves; a callback at each node of the graph costs a little.
_INTERRUPTIBLE_TOKENS = 32
# Where more than this share of a per-slot KV buffer is in use, copying the whole buffer is faster.
_COPIED_CELL_BY_CELL = 0.25
# ggml type numbers, and bytes of an element (ggml.h: blocks of 32 with a 16-bit scale).
_KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


@dataclass(frozen=True, slots=True)
class Settings(base.Settings):
    """How a GGUF is loaded. capacity: KV cells in all (unified KV cache only).

    unified: one KV cache for all slots, else a KV buffer for each. per_slot_fits: the memory has room for a
    buffer of `context` cells for each slot. kv_type: f16, q8_0 or q4_0. gpu_layers: -1 all, 0 none.
    extra_buffers: repacked weights, which are faster; off where the build failed its check.
    """

    capacity: int = 16384
    flash_attention: bool = False
    unified: bool = True
    per_slot_fits: bool = False
    kv_type: str = "f16"
    gpu_layers: int = 0
    extra_buffers: bool = True
    why: str = ""

    @property
    def layouts(self) -> list[bool]:
        """The values of `unified` that the memory allows."""
        return [True, False] if self.per_slot_fits else [True]

    @property
    def cells(self) -> int:
        """KV cells in all."""
        return self.capacity if self.unified else self.slots * self.context


class Model:
    """A loaded GGUF file; contexts with different settings may be created over it.

    Raises UnavailableError without the library, MemoryFullError where its weights find no room, InputError
    for a file that cannot be served.
    """

    def __init__(self, path: Path, *, gpu_layers: int = 0, extra_buffers: bool = True) -> None:
        self.lib = lib = library()
        self.path = path
        params = filled(
            lib.llama_model_default_params(), n_gpu_layers=gpu_layers, use_extra_bufts=extra_buffers
        )
        with native_errors() as log:
            self.pointer = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise _no_memory(path, log.tail()) or InputError(
                f"llama.cpp cannot load {path}: {log.tail()}", "verify or export the file again"
            )
        if lib.llama_model_has_encoder(self.pointer) or not lib.llama_model_has_decoder(self.pointer):
            raise InputError(f"{path} is not a decoder-only text model", "serve a causal language model")
        if lib.llama_model_is_recurrent(self.pointer) or lib.llama_model_is_hybrid(self.pointer):
            raise InputError(
                f"{path} has recurrent layers, whose state cannot be cut back to a prefix",
                "serve a transformer model",
            )
        if extra_buffers:
            linux_memory.drop_file_pages(part_files(path))
        self.vocab = lib.llama_model_get_vocab(self.pointer)
        self.vocabulary = Vocabulary(lib, self.vocab)
        self._adapters: dict[Path, Any] = {}

    def adapter(self, path: Path) -> Any:
        """The LoRA adapter in the GGUF file `path`, checked by find.check_lora; freed with the model."""
        if path not in self._adapters:
            with native_errors() as log:
                adapter = self.lib.llama_adapter_lora_init(self.pointer, os.fsencode(path))
            if not adapter:
                raise InputError(
                    f"llama.cpp cannot use {path} on {self.path}: {log.tail()}",
                    "give an adapter that was trained on this model",
                )
            self._adapters[path] = adapter
        return self._adapters[path]

    def close(self) -> None:
        if self.pointer:
            self.lib.llama_model_free(self.pointer)
        self.pointer = None


class MemoryFullError(UnavailableError):
    """A device's memory has no room for the weights or for a context."""


def _no_memory(path: Path, log: str) -> EdgeError | None:
    """The error where the log says that a device's memory was full; None where it does not."""
    if not re.search(r"out of memory|failed to allocate|unable to allocate", log, re.IGNORECASE):
        return None
    return MemoryFullError(
        f"{path}: the memory is full: {log}",
        "free some of it (nvidia-smi shows who uses the GPU's), lower --ctx or --slots, or add --device cpu",
    )


class LlamaCpp(Backend):
    """A context over a model, as a Backend. Raises InputError where it cannot be created.

    lora: an adapter that goes on top of the model, for all of the context's sequences alike.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        *,
        extra_stop_ids: frozenset[int] = frozenset(),
        lora: Path | None = None,
    ) -> None:
        super().__init__(settings.slots)
        self._lib = lib = model.lib
        self._model = model
        self._vocab = model.vocab
        self._settings = settings
        self._context = self._new_context()
        if lora is not None:
            self._put_on(lora)
        self._memory = lib.llama_get_memory(self._context)
        self._make_batch()
        self._pieces: dict[int, bytes] = {}
        self._piece = ctypes.create_string_buffer(64)
        # With a GPU the CPU's threads do next to nothing.
        self._controller = ThreadController(settings.threads) if settings.gpu_layers == 0 else None
        self._splits = not settings.unified and settings.gpu_layers == 0
        self._embedder = Embedder(
            lib,
            model.pointer,
            threads=settings.threads,
            flash_attention=settings.flash_attention,
        )
        self._abort = lib.ggml_abort_callback(lambda _: self._interrupted)
        self._no_abort = lib.ggml_abort_callback()
        self.info = self._describe(extra_stop_ids)

    def _new_context(self) -> Any:
        lib, settings = self._lib, self._settings
        if settings.kv_type != "f16" and not settings.flash_attention:
            # Native code would fall over it rather than say so.
            raise UsageError(f"a {settings.kv_type} KV cache needs flash attention", "use kv type f16")
        params = filled(
            lib.llama_context_default_params(),
            n_ctx=settings.cells,
            n_batch=settings.batch,
            n_ubatch=settings.batch,
            n_seq_max=settings.slots,
            n_outputs_max=settings.outputs,
            n_threads=settings.threads,
            n_threads_batch=settings.threads,
            flash_attn_type=int(settings.flash_attention),
            type_k=_KV_TYPES[settings.kv_type],
            type_v=_KV_TYPES[settings.kv_type],
            kv_unified=settings.unified,
            no_perf=True,
        )
        # CUDA has threads and pinned memory of its own, which must not be touched.
        returned = linux_memory.return_zero_pages() if settings.gpu_layers == 0 else contextlib.nullcontext()
        with native_errors() as log, returned:
            context = lib.llama_init_from_model(self._model.pointer, params)
        if not context:
            raise _no_memory(self._model.path, log.tail()) or InputError(
                f"{self._model.path}: llama.cpp cannot create a context of {settings.cells} tokens: "
                f"{log.tail()}",
                "serve with a smaller --ctx or fewer --slots",
            )
        return context

    def _put_on(self, lora: Path) -> None:
        kind = self._lib.llama_adapter_lora_p_ctypes
        adapters, scales = (kind * 1)(self._model.adapter(lora)), (ctypes.c_float * 1)(1.0)
        if self._lib.llama_set_adapters_lora(self._context, adapters, 1, scales) != 0:
            raise EdgeError(f"llama.cpp cannot put {lora} on {self._model.path}")

    def _make_batch(self) -> None:
        n = self._settings.batch
        self._tokens = np.zeros(n, np.int32)
        self._positions = np.zeros(n, np.int32)
        self._counts = np.ones(n, np.int32)
        self._slot_of = np.zeros(n, np.int32)
        self._wanted = np.zeros(n, np.int8)
        base = self._slot_of.ctypes.data
        # Each token's list of sequences has one entry, which lies in _slot_of.
        self._slot_lists = np.arange(base, base + 4 * n, 4, dtype=np.uintp)
        batch = self._lib.llama_batch()
        for name, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._counts),
            ("seq_id", self._slot_lists),
            ("logits", self._wanted),
        ):
            kind = dict(batch._fields_)[name]
            setattr(batch, name, ctypes.cast(ctypes.c_void_p(array.ctypes.data), kind))
        self._batch = batch

    def _describe(self, extra_stop_ids: frozenset[int]) -> BackendInfo:
        lib, settings, vocab = self._lib, self._settings, self._vocab
        vocabulary = self._model.vocabulary
        ends = {i for i in range(vocabulary.size) if lib.llama_vocab_is_eog(vocab, i)}
        bos, eos = lib.llama_vocab_bos(vocab), lib.llama_vocab_eos(vocab)
        template = lib.llama_model_chat_template(self._model.pointer, None)
        build = lib.llama_print_system_info().decode("utf-8", "replace").strip()
        return BackendInfo(
            kind="llamacpp",
            name=self._model.path.name,
            device=settings.device,
            why=settings.why,
            slots=settings.slots,
            context=settings.context,
            capacity=settings.cells,
            shared=settings.unified,
            batch=settings.batch,
            outputs=settings.outputs,
            vocab=vocabulary.size,
            token_bytes=vocabulary.token_bytes,
            strips=vocabulary.strips,
            added=vocabulary.added,
            stop_ids=frozenset(ends) | extra_stop_ids,
            bos_id=bos if bos >= 0 else None,
            add_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
            bos_text=self._token_text(bos),
            eos_text=self._token_text(eos),
            embedding=self._embedder.width,
            # The GPU computes asynchronously; reading the logits waits for it.
            overlaps=settings.gpu_layers != 0,
            chat_template=template.decode("utf-8") if template else None,
            settings={
                "threads": str(settings.threads),
                "flash_attention": "on" if settings.flash_attention else "off",
                "kv": "unified" if settings.unified else "per slot",
                "kv_type": settings.kv_type,
                "batch": str(settings.batch),
                "tuned": settings.tuned,
                "gpu_layers": str(settings.gpu_layers),
                "build": f"stock ({build})" if build_llamacpp.stock() else build,
            },
        )

    def _token_text(self, token: int) -> str:
        text = self._lib.llama_vocab_get_text(self._vocab, token) if token >= 0 else None
        return text.decode("utf-8", "replace") if text else ""

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._model.vocabulary.encode(text, special=special)

    def marks(self, *, special: bool) -> tuple[str, ...]:
        return self._model.vocabulary.marks if special else self._model.vocabulary.parsed_always

    def decode(self, token: int) -> bytes:
        if token not in self._pieces:
            buffer = self._piece
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            if count < 0:
                # The size that the token needs.
                buffer = ctypes.create_string_buffer(-count)
                count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            self._pieces[token] = ctypes.string_at(buffer, count)
        return self._pieces[token]

    def step(self, rows: Sequence[Row]) -> Logits:
        check_rows(rows, self.info, self._lengths)
        self._interrupted = False
        pieces = [row for row in rows if len(row.tokens) > 1]
        try:
            if self._splits and 0 < len(pieces) < len(rows):
                logits = self._split(rows, pieces)
            else:
                logits = self._pass(rows, last=True)
        except StepInterrupted:
            for row in rows:
                self._lib.llama_memory_seq_rm(self._memory, row.slot, row.pos, -1)
            raise
        for row in rows:
            self._lengths[row.slot] += len(row.tokens)
        return logits

    def _split(self, rows: Sequence[Row], pieces: Sequence[Row]) -> Logits:
        """Chunks of prompts and rows of one token, in a pass each.

        In one pass llama.cpp would first run one token of every row, with all rows attending over as many KV
        cells as the longest row has.
        """
        first = self._pass(pieces, last=False).copy()
        second = self._pass([row for row in rows if len(row.tokens) == 1], last=True)
        if not len(first):
            return second
        logits = np.empty((len(first) + len(second), self.info.vocab), np.float32)
        of_piece = np.repeat([len(row.tokens) > 1 for row in rows], [row.outputs for row in rows])
        logits[of_piece], logits[~of_piece] = first, second
        return logits

    def _pass(self, rows: Sequence[Row], *, last: bool) -> Logits:
        """One llama_decode; logits [outputs, vocab]. last: `meanwhile` overlaps the step's last pass."""
        start = outputs = 0
        for row in rows:
            end = start + len(row.tokens)
            self._tokens[start:end] = row.tokens
            self._positions[start:end] = range(row.pos, row.pos + len(row.tokens))
            self._slot_of[start:end] = row.slot
            self._wanted[start:end] = 0
            self._wanted[end - row.outputs : end] = 1
            outputs += row.outputs
            start = end
        self._batch.n_tokens = start
        long = max(len(row.tokens) for row in rows) >= _INTERRUPTIBLE_TOKENS
        if long:
            self._lib.llama_set_abort_callback(self._context, self._abort, None)
        code = self._decode(start, start == len(rows))
        if code == 0 and last and self.info.overlaps:
            self.meanwhile()
        if long:
            self._lib.llama_set_abort_callback(self._context, self._no_abort, None)
        if code == 2:
            raise StepInterrupted
        if code != 0:
            raise EdgeError(f"llama.cpp failed in a step of {start} tokens (code {code})", FULL)
        return self._logits(outputs) if outputs else np.zeros((0, self.info.vocab), np.float32)

    def _decode(self, total: int, decodes: bool) -> int:
        """llama_decode; the thread controller learns from steps that only decode, and sets the threads."""
        controller = self._controller
        if controller is None or not decodes:
            return int(self._lib.llama_decode(self._context, self._batch))
        used, began = controller.threads, time.perf_counter()
        code = int(self._lib.llama_decode(self._context, self._batch))
        now = time.perf_counter()
        controller.learn(total, now - began, now)
        if controller.threads != used:
            self._lib.llama_set_n_threads(self._context, controller.threads, controller.threads)
        return code

    def _logits(self, outputs: int) -> Logits:
        pointer = self._lib.llama_get_logits(self._context)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        assert address is not None
        buffer = (ctypes.c_float * (outputs * self.info.vocab)).from_address(address)
        flat: NDArray[np.float32] = np.frombuffer(memoryview(buffer), np.float32)
        return flat.reshape(outputs, self.info.vocab)

    def _copy(self, src: int, dst: int, n: int) -> None:
        lib = self._lib
        lib.llama_memory_seq_rm(self._memory, dst, -1, -1)
        if not self._copy_cells(src, dst):
            lib.llama_memory_seq_cp(self._memory, src, dst, -1, -1)
        self._truncate(dst, n)

    def _copy_cells(self, src: int, dst: int) -> bool:
        """Whether only the KV cells in use were copied.

        llama.cpp copies a slot's KV buffer whole. Where little of it is used that takes longer, and touches
        memory that was never used. In a unified KV cache a copy only counts references; a GPU copies at once.
        """
        many = self._lengths[src] > _COPIED_CELL_BY_CELL * self.info.context
        if many or self._settings.unified or self._settings.gpu_layers:
            return False
        return self._restore(dst, self.save(src), self._lengths[src])

    def _truncate(self, slot: int, n: int) -> None:
        if not self._lib.llama_memory_seq_rm(self._memory, slot, n, -1):
            raise EdgeError(f"llama.cpp cannot cut slot {slot} back to {n} tokens")

    def save(self, slot: int) -> memoryview:
        """The KV cells of a slot in llama.cpp's own format, for `restore` into a like context."""
        cells = np.empty(self._lib.llama_state_seq_get_size(self._context, slot), np.uint8)
        written = self._lib.llama_state_seq_get_data(self._context, _pointer(cells), cells.size, slot)
        return cells[:written].data

    def _restore(self, slot: int, cells: Cells, length: int) -> bool:
        data = np.frombuffer(cells, np.uint8)
        if self._lib.llama_state_seq_set_data(self._context, _pointer(data), data.size, slot) == data.size:
            return True
        self._lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return False

    def close(self) -> None:
        """Free the context. The model stays, because other contexts may use it."""
        self._embedder.close()
        if self._context:
            self._lib.llama_free(self._context)
        self._context = None


def _pointer(array: NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class _Log:
    """Lines that llama.cpp logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def tail(self) -> str:
        """The last lines that say what went wrong."""
        lines = [line.strip() for line in self.lines if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
        return "; ".join((errors or lines)[-2:]) or "it gave no reason"


_logs: list[_Log] = []
# Native code calls it until the process ends: it must never be collected.
_callbacks: list[Any] = []


def _append(level: int, text: bytes, data: object) -> None:
    if _logs:
        _logs[-1].lines.append(text.decode("utf-8", "replace"))


@contextlib.contextmanager
def native_errors() -> Iterator[_Log]:
    """What llama.cpp logs within the block; outside of such blocks its log is discarded."""
    log = _Log()
    _logs.append(log)
    try:
        yield log
    finally:
        _logs.remove(log)


def library() -> Any:
    """llama-cpp-python's low-level bindings. Raises UnavailableError where they do not load."""
    try:
        import llama_cpp.llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as error:
        raise UnavailableError(
            f"llama-cpp-python cannot be loaded: {error}",
            f"build it for this machine: {BUILD}; or serve ONNX: edge export onnx RUN",
        ) from error
    if not _callbacks:
        _callbacks.append(lib.llama_log_callback(_append))
        lib.llama_log_set(_callbacks[0], None)
        lib.llama_backend_init()
        load_backends(lib)
    return lib
