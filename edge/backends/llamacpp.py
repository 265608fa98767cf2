"""llama.cpp through llama-cpp-python's low-level bindings, one step at a time.

Everything that the native code would end the process for (see `check_rows`) is refused in Python first.
The KV cache is either one pool of cells for all slots (`kv_unified`) or a fixed part for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.artefact.gguf_shards import part_files
from edge.backends import linux_mapped, linux_pages
from edge.backends.base import FULL, BackendInfo, Logits, Row, StepInterrupted, check_rows, nothing
from edge.backends.llamacpp_embedding import Embedder
from edge.backends.llamacpp_threads import Governor
from edge.errors import EdgeError, InputError, UnavailableError, UsageError

# Steps shorter than this end soon enough by themselves; asking a callback at each node costs a little.
_INTERRUPTIBLE_TOKENS = 32
# Of a slot's own part, more than this share in use is copied sooner with all of the part.
_COPIED_CELL_BY_CELL = 0.25
# ggml type numbers, and bytes of an element (ggml.h: blocks of 32 with a 16-bit scale).
_KV_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is loaded. context: tokens of one sequence; capacity: cells of the pool (unified only).
    parts: the memory has room for a part of `context` cells for each slot.

    threads / threads_batch: for steps of a few rows and for prompts. gpu_layers: -1 all, 0 none.
    kv_type: f16, q8_0 or q4_0. extra_buffers: repacked weights, which are
    faster; off where the build failed its check.
    """

    slots: int = 16
    context: int = 4096
    capacity: int = 16384
    batch: int = 512
    threads: int = 1
    threads_batch: int = 1
    flash_attention: bool = False
    unified: bool = True
    parts: bool = False
    kv_type: str = "f16"
    gpu_layers: int = 0
    extra_buffers: bool = True
    device: str = "cpu"
    why: str = ""
    tuned: str = "not measured"

    @property
    def outputs(self) -> int:
        """Logits of one step: each slot's next token and room for drafts. Bounds the compute buffer."""
        return min(self.batch, self.slots + 64)


class Model:
    """A loaded GGUF file; contexts with different settings may be made over it.

    Raises UnavailableError without the library, InputError for a file that cannot be served.
    """

    def __init__(self, path: Path, *, gpu_layers: int = 0, extra_buffers: bool = True) -> None:
        self.lib = lib = library()
        self.path = path
        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.use_extra_bufts = extra_buffers
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
            linux_mapped.let_go(part_files(path))
        self.vocab = lib.llama_model_get_vocab(self.pointer)
        self._adapters: dict[Path, Any] = {}

    def adapter(self, path: Path) -> Any:
        """The LoRA adapter in the GGUF file `path`, checked by edge.lora; freed with the model."""
        if path not in self._adapters:
            with native_errors() as log:
                found = self.lib.llama_adapter_lora_init(self.pointer, os.fsencode(path))
            if not found:
                raise InputError(
                    f"llama.cpp cannot use {path} on {self.path}: {log.tail()}",
                    "give an adapter that was trained on this model",
                )
            self._adapters[path] = found
        return self._adapters[path]

    def close(self) -> None:
        if self.pointer:
            self.lib.llama_model_free(self.pointer)
        self.pointer = None


def _no_memory(path: Path, log: str) -> EdgeError | None:
    """What to say where the log tells that a device's memory was full; None where it does not."""
    if not re.search(r"out of memory|failed to allocate|unable to allocate", log, re.IGNORECASE):
        return None
    return UnavailableError(
        f"{path}: the memory is full: {log}",
        "free some of it (nvidia-smi shows who has the card's), lower --ctx or --slots, or add --device cpu",
    )


class LlamaCpp:
    """A context over a model, as a Backend. Raises InputError where the context cannot be made.

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
        self._lib = lib = model.lib
        self._model = model
        self._vocab = model.vocab
        self._settings = settings
        self._context = self._new_context()
        if lora is not None:
            self._put_on(lora)
        self._memory = lib.llama_get_memory(self._context)
        self._make_batch()
        self.meanwhile: Callable[[], None] = nothing
        self._pieces: dict[int, bytes] = {}
        self._lengths = [0] * settings.slots
        # On a card the CPU's threads do next to nothing.
        self._governor = Governor(settings.threads) if settings.gpu_layers == 0 else None
        self._splits = not settings.unified and settings.gpu_layers == 0
        self._embedder = Embedder(
            lib,
            model.pointer,
            threads=settings.threads_batch,
            flash_attention=settings.flash_attention,
        )
        self._interrupted = False
        self._abort = lib.ggml_abort_callback(lambda _: self._interrupted)
        self._no_abort = lib.ggml_abort_callback()
        self.info = self._describe(extra_stop_ids)

    def _new_context(self) -> Any:
        lib, settings = self._lib, self._settings
        if settings.kv_type != "f16" and not settings.flash_attention:
            # Native code would fall over it rather than say so.
            raise UsageError(f"a {settings.kv_type} KV cache needs flash attention", "use kv type f16")
        params = lib.llama_context_default_params()
        params.n_ctx = settings.capacity if settings.unified else settings.slots * settings.context
        params.n_batch = params.n_ubatch = settings.batch
        params.n_seq_max = settings.slots
        params.n_outputs_max = settings.outputs
        params.n_threads = settings.threads
        params.n_threads_batch = settings.threads_batch
        params.flash_attn_type = 1 if settings.flash_attention else 0
        params.type_k = params.type_v = _KV_TYPES[settings.kv_type]
        params.kv_unified = settings.unified
        params.no_perf = True
        # A card's library has threads and pinned memory of its own, which are none of ours to look at.
        cleared = linux_pages.given_back() if settings.gpu_layers == 0 else contextlib.nullcontext()
        with native_errors() as log, cleared:
            context = lib.llama_init_from_model(self._model.pointer, params)
        if not context:
            raise _no_memory(self._model.path, log.tail()) or InputError(
                f"{self._model.path}: llama.cpp cannot make a context of {params.n_ctx} tokens: {log.tail()}",
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
        size = lib.llama_vocab_n_tokens(vocab)
        ends = {i for i in range(size) if lib.llama_vocab_is_eog(vocab, i)}
        bos, eos = lib.llama_vocab_bos(vocab), lib.llama_vocab_eos(vocab)
        template = lib.llama_model_chat_template(self._model.pointer, None)
        return BackendInfo(
            kind="llamacpp",
            name=self._model.path.name,
            device=settings.device,
            why=settings.why,
            slots=settings.slots,
            context=settings.context,
            capacity=settings.capacity if settings.unified else settings.slots * settings.context,
            shared=settings.unified,
            batch=settings.batch,
            outputs=settings.outputs,
            vocab=size,
            stop_ids=frozenset(ends) | extra_stop_ids,
            bos_id=bos if bos >= 0 else None,
            add_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
            bos_text=self._token_text(bos),
            eos_text=self._token_text(eos),
            embedding=self._embedder.width,
            # A card is given its work, and waited for when the logits are asked for.
            overlaps=settings.gpu_layers != 0,
            chat_template=template.decode("utf-8") if template else None,
            settings={
                "threads": str(settings.threads),
                "threads_batch": str(settings.threads_batch),
                "flash_attention": "on" if settings.flash_attention else "off",
                "kv": "one pool" if settings.unified else "a part for each slot",
                "kv_type": settings.kv_type,
                "batch": str(settings.batch),
                "tuned": settings.tuned,
                "gpu_layers": str(settings.gpu_layers),
                "build": lib.llama_print_system_info().decode("utf-8", "replace").strip(),
            },
        )

    def _token_text(self, token: int) -> str:
        text = self._lib.llama_vocab_get_text(self._vocab, token) if token >= 0 else None
        return text.decode("utf-8", "replace") if text else ""

    def encode(self, text: str, *, special: bool) -> list[int]:
        return encode(self._lib, self._vocab, text, special=special)

    def decode(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = _piece(self._lib, self._vocab, token)
        return piece

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
        """The pieces of prompts, and then the rows of one token, in passes of their own.

        llama.cpp would run a token of each row, then the rest of the pieces, and in the first of these have
        all rows attend over as many cells as the longest text has.
        """
        first = self._pass(pieces, last=False).copy()
        second = self._pass([row for row in rows if len(row.tokens) == 1], last=True)
        if not len(first):
            return second
        made = np.empty((len(first) + len(second), self.info.vocab), np.float32)
        of_piece = np.repeat([len(row.tokens) > 1 for row in rows], [row.outputs for row in rows])
        made[of_piece], made[~of_piece] = first, second
        return made

    def _pass(self, rows: Sequence[Row], *, last: bool) -> Logits:
        """(outputs, vocabulary): one llama_decode, with time for the engine in the step's `last` one."""
        at = outputs = 0
        for row in rows:
            end = at + len(row.tokens)
            self._tokens[at:end] = row.tokens
            self._positions[at:end] = range(row.pos, row.pos + len(row.tokens))
            self._slot_of[at:end] = row.slot
            self._wanted[at:end] = 0
            self._wanted[end - row.outputs : end] = 1
            outputs += row.outputs
            at = end
        self._batch.n_tokens = at
        long = max(len(row.tokens) for row in rows) >= _INTERRUPTIBLE_TOKENS
        if long:
            self._lib.llama_set_abort_callback(self._context, self._abort, None)
        code = self._decode_governed(at, at == len(rows))
        if code == 0 and last and self.info.overlaps:
            self.meanwhile()
        if long:
            self._lib.llama_set_abort_callback(self._context, self._no_abort, None)
        if code == 2:
            raise StepInterrupted
        if code != 0:
            raise EdgeError(f"llama.cpp failed in a step of {at} tokens (code {code})", FULL)
        return self._logits(outputs) if outputs else np.zeros((0, self.info.vocab), np.float32)

    def _decode_governed(self, total: int, decodes: bool) -> int:
        """One llama_decode; decoding steps tell the governor what they took, and use what it says.

        A step with a piece of a prompt takes longer than one of as many rows, whoever else is on the cores.
        """
        governor = self._governor
        if governor is None or not decodes:
            return int(self._lib.llama_decode(self._context, self._batch))
        used, began = governor.threads, time.perf_counter()
        code = int(self._lib.llama_decode(self._context, self._batch))
        now = time.perf_counter()
        governor.learn(total, now - began, now)
        if governor.threads != used:
            batch = min(self._settings.threads_batch, governor.threads)
            self._lib.llama_set_n_threads(self._context, governor.threads, batch)
        return code

    def _logits(self, outputs: int) -> Logits:
        pointer = self._lib.llama_get_logits(self._context)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        assert address is not None
        buffer = (ctypes.c_float * (outputs * self.info.vocab)).from_address(address)
        flat: NDArray[np.float32] = np.frombuffer(memoryview(buffer), np.float32)
        return flat.reshape(outputs, self.info.vocab)

    def copy(self, src: int, dst: int, n: int) -> None:
        slots = self.info.slots
        if src == dst or not (0 <= src < slots and 0 <= dst < slots) or not 0 <= n <= self._lengths[src]:
            raise ValueError(f"copy of {n} tokens from slot {src} to {dst}")
        self.truncate(dst, 0)
        if not self._copy_cells(src, dst):
            self._lib.llama_memory_seq_cp(self._memory, src, dst, -1, -1)
        self._lengths[dst] = self._lengths[src]
        self.truncate(dst, n)

    def _copy_cells(self, src: int, dst: int) -> bool:
        """Whether the cells in use were copied by themselves.

        llama.cpp copies a slot's part whole. Where little of it is used that takes longer, and memory that
        nobody had touched. A pool's cells are only counted once more, and a card copies at once.
        """
        many = self._lengths[src] > _COPIED_CELL_BY_CELL * self.info.context
        if many or self._settings.unified or self._settings.gpu_layers:
            return False
        lib = self._lib
        cells = np.empty(lib.llama_state_seq_get_size(self._context, src), np.uint8)
        pointer = cells.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        lib.llama_state_seq_get_data(self._context, pointer, cells.size, src)
        if lib.llama_state_seq_set_data(self._context, pointer, cells.size, dst) == cells.size:
            return True
        lib.llama_memory_seq_rm(self._memory, dst, -1, -1)
        return False

    def truncate(self, slot: int, n: int) -> None:
        if not 0 <= slot < self.info.slots or not 0 <= n <= self._lengths[slot]:
            raise ValueError(f"truncate slot {slot} to {n}")
        if not self._lib.llama_memory_seq_rm(self._memory, slot, n, -1):
            raise EdgeError(f"llama.cpp cannot cut slot {slot} back to {n} tokens")
        self._lengths[slot] = n

    def interrupt(self) -> None:
        self._interrupted = True

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `Embeds`. Raises EdgeError where the memory does not suffice."""
        if not 0 < len(tokens) <= self.info.context or not all(0 <= t < self.info.vocab for t in tokens):
            raise ValueError(f"cannot embed {len(tokens)} tokens")
        return self._embedder.embed(tokens)

    def save(self, slot: int) -> bytes:
        """The KV cells of a slot in llama.cpp's own format, for `restore` into a like context."""
        size = self._lib.llama_state_seq_get_size(self._context, slot)
        buffer = (ctypes.c_uint8 * size)()
        written = self._lib.llama_state_seq_get_data(self._context, buffer, size, slot)
        return bytes(memoryview(buffer)[:written])

    def restore(self, slot: int, data: bytes, length: int) -> bool:
        """Fill an empty slot with cells that `save` gave for `length` tokens. False where they do not fit."""
        if self._lengths[slot] != 0 or not 0 < length <= self.info.context:
            raise ValueError(f"restore of {length} tokens into slot {slot} of {self._lengths[slot]}")
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        read = self._lib.llama_state_seq_set_data(self._context, buffer, len(data), slot)
        if read != len(data):
            self._lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
            return False
        self._lengths[slot] = length
        return True

    def close(self) -> None:
        """Free the context; the model stays, for others may use it."""
        self._embedder.close()
        if self._context:
            self._lib.llama_free(self._context)
        self._context = None


def encode(lib: Any, vocab: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of `text` by llama.cpp's own tokenizer, without begin- or end-of-text tokens."""
    data = text.encode("utf-8")
    room = len(data) + 16
    ids = (ctypes.c_int32 * room)()
    count = lib.llama_tokenize(vocab, data, len(data), ids, room, False, special)
    if count < 0:
        raise EdgeError(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
    return list(ids[:count])


def _piece(lib: Any, vocab: Any, token: int) -> bytes:
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        count = lib.llama_token_to_piece(vocab, token, buffer, size, 0, False)
        if count >= 0:
            return buffer.raw[:count]
        size = -count


class _Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def tail(self) -> str:
        """The last lines that say what went wrong."""
        said = [line.strip() for line in self.lines if line.strip()]
        bad = [line for line in said if "error" in line.lower() or "fail" in line.lower()]
        return "; ".join((bad or said)[-2:]) or "it gave no reason"


_listening: list[_Log] = []
# Native code calls it until the process ends: it must never be collected.
_callbacks: list[Any] = []


def _quiet(level: int, text: bytes, data: object) -> None:
    if _listening:
        _listening[-1].lines.append(text.decode("utf-8", "replace"))


@contextlib.contextmanager
def native_errors() -> Iterator[_Log]:
    log = _Log()
    _listening.append(log)
    try:
        yield log
    finally:
        _listening.remove(log)


def library() -> Any:
    try:
        import llama_cpp.llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as error:
        raise UnavailableError(
            f"llama-cpp-python cannot be loaded: {error}",
            "build it for this machine: python -m edge.machine.build_llamacpp",
        ) from error
    if not _callbacks:
        _callbacks.append(lib.llama_log_callback(_quiet))
        lib.llama_log_set(_callbacks[0], None)
        lib.llama_backend_init()
    return lib
