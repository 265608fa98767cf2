"""Decodes of a tiny model, run as a process of its own: `python build_check.py plain|extra|gpu`.

A wrong build dies in native code at its first matrix product, so the check has a process of its own. `plain`
uses ordinary buffers, `extra` lets the CPU backend repack weights (AMX and the like), `gpu` puts all layers
on the GPU; the last two compare their logits with `plain`. There are two threads, because tile configuration
is per thread, and chunks of several lengths, because few and many tokens are multiplied by different code.
The model is written here: one llama layer of random weights, of the types that edge/csrc multiplies.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, FEED, VOCAB = 256, 512, 64
CHUNKS = (96, 1, 1, 3, 12, 1)
MIN_COSINE = 0.99


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode("ascii")


def write_model(path: Path) -> None:
    """A GGUF file of about 0.5 MB that llama.cpp loads without a vocabulary."""
    random = np.random.default_rng(7)
    tensors: list[tuple[str, tuple[int, ...], int, bytes]] = []

    def dense(name: str, *shape: int) -> None:
        values = np.ones(shape) if len(shape) == 1 else random.normal(0, 1, shape)
        tensors.append((name, shape, 0, values.astype("<f4").tobytes()))

    def quantised(name: str, kind: str, columns: int, rows: int) -> None:
        # GGUF's number of the type; values and bytes of a block; offset and values of its float16 scales.
        number, values, size, place, halves = {
            "Q4_0": (2, 32, 18, 0, (0.02,)),
            "Q8_0": (8, 32, 34, 0, (0.0015,)),
            "Q4_K": (12, 256, 144, 0, (0.0004, 0.003)),
            "Q6_K": (14, 256, 210, 208, (0.0001,)),
        }[kind]
        blocks = random.integers(0, 256, (rows * columns // values, size), np.uint8)
        blocks[:, place : place + 2 * len(halves)] = np.array(halves, "<f2").view(np.uint8)
        tensors.append((name, (columns, rows), number, blocks.tobytes()))

    dense("token_embd.weight", WIDTH, VOCAB)
    dense("output_norm.weight", WIDTH)
    quantised("output.weight", "Q6_K", WIDTH, VOCAB)
    dense("blk.0.attn_norm.weight", WIDTH)
    dense("blk.0.ffn_norm.weight", WIDTH)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        quantised(f"blk.0.{name}.weight", "Q4_0", WIDTH, WIDTH)
    quantised("blk.0.ffn_gate.weight", "Q8_0", WIDTH, FEED)
    quantised("blk.0.ffn_up.weight", "Q4_K", WIDTH, FEED)
    quantised("blk.0.ffn_down.weight", "Q4_K", FEED, WIDTH)

    words = {"general.architecture": "llama", "tokenizer.ggml.model": "none"}
    numbers = {
        "vocab_size": VOCAB,
        "context_length": 256,
        "embedding_length": WIDTH,
        "block_count": 1,
        "feed_forward_length": FEED,
        "attention.head_count": 4,
    }
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(words) + len(numbers) + 1)
    out += b"".join(_text(key) + struct.pack("<I", 8) + _text(value) for key, value in words.items())
    out += b"".join(_text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items())
    out += _text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)
    offset = 0
    for name, shape, kind, data in tensors:
        out += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += -(-len(data) // 32) * 32
    out += b"\0" * (-len(out) % 32)
    path.write_bytes(out + b"".join(data + b"\0" * (-len(data) % 32) for _, _, _, data in tensors))


def load_backends(lib: Any) -> None:
    """Load the backends of a llama.cpp that has them as files beside it (GGML_BACKEND_DL); without one it
    loads no model. A llama.cpp with its backends built in is left alone.

    lib: llama-cpp-python's low-level bindings.
    """
    # Only Windows does not look for a function in what a library is linked with.
    ggml = ctypes.CDLL(str(lib._base_path / "ggml.dll")) if sys.platform == "win32" else lib._lib
    try:
        count, load = ggml.ggml_backend_reg_count, ggml.ggml_backend_load_all_from_path
    except AttributeError:
        return  # all is in one file
    count.restype, load.argtypes, load.restype = ctypes.c_size_t, [ctypes.c_char_p], None
    if count() == 0:
        load(os.fsencode(lib._base_path))


def logits(path: Path, *, extra: bool, gpu: bool) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Logits `[chunks, VOCAB]` after each of CHUNKS."""
    import llama_cpp.llama_cpp as lib

    load_backends(lib)
    model_params = lib.llama_model_default_params()
    model_params.use_extra_bufts = extra
    model_params.n_gpu_layers = 99 if gpu else 0
    model = lib.llama_model_load_from_file(os.fsencode(path), model_params)
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 128
    params.n_threads = params.n_threads_batch = 2
    context = lib.llama_init_from_model(model, params) if model else None
    if not context:
        raise SystemExit("the model could not be loaded")
    rows = []
    for length in CHUNKS:
        chunk = [(7 * index) % VOCAB for index in range(length)]
        array = (ctypes.c_int32 * len(chunk))(*chunk)
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(chunk))) != 0:
            raise SystemExit("llama_decode failed")
        rows.append(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (VOCAB,)).copy())
    lib.llama_free(context)
    lib.llama_model_free(model)
    return np.stack(rows)


def main(mode: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.gguf"
        write_model(path)
        plain = logits(path, extra=False, gpu=False)
        other = plain if mode == "plain" else logits(path, extra=mode == "extra", gpu=mode == "gpu")
    norms = np.linalg.norm(plain, axis=1) * np.linalg.norm(other, axis=1)
    cosine = float(np.min((plain * other).sum(axis=1) / norms))
    if not cosine >= MIN_COSINE:  # NaN fails too
        raise SystemExit(f"wrong numbers: cosine {cosine:.4f} with the plain build")
    sys.stdout.write(f"ok, cosine {cosine:.5f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
