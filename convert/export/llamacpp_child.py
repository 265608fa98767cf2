"""What needs llama.cpp itself, as a process of its own: `python llamacpp_child.py quantize|inspect < JSON`.

Native code may abort, so convert.export.gguf never loads it. Reads one JSON object from standard input and writes
one to standard output; llama.cpp's log goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """`source`, `target`: paths; `ftype`: llama_ftype; `threads`; `imatrix`: an archive of Matrix.save."""
    params = lib.llama_model_quantize_default_params()
    params.ftype = job["ftype"]
    params.nthread = job["threads"]
    # A 7B model's largest tensor in float32, in parts of this size.
    params.max_buf_size = 1 << 30
    held = []
    if job.get("imatrix"):
        with np.load(job["imatrix"], allow_pickle=False) as archive:
            names = [str(name) for name in archive["names"]]
            held = [np.ascontiguousarray(archive[f"t{n}"], np.float32) for n in range(len(names))]
        # The list ends with an entry without a name.
        entries = (lib.llama_model_imatrix_data * (len(held) + 1))()
        for entry, name, values in zip(entries, names, held, strict=False):
            entry.name = name.encode("utf-8")
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        params.imatrix = entries
    code = lib.llama_model_quantize(job["source"].encode("utf-8"), job["target"].encode("utf-8"), params)
    return {"code": code}


def _tokenize(vocab: Any, text: str) -> list[int]:
    data = text.encode("utf-8")
    room = len(data) + 16
    tokens = (ctypes.c_int32 * room)()
    count = lib.llama_tokenize(vocab, data, len(data), tokens, room, False, True)
    return list(tokens[:count])


def inspect(job: dict[str, Any]) -> dict[str, Any]:
    """`path`: the file; `prompts`: texts. Gives the token ids of each, and the ends.

    One token is decoded too: a missing tensor shows only when the weights are loaded.
    """
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # repacking every weight would cost more than the one token
    model = lib.llama_model_load_from_file(job["path"].encode("utf-8"), params)
    if not model:
        raise SystemExit("llama.cpp cannot load the file")
    vocab = lib.llama_model_get_vocab(model)
    count = lib.llama_vocab_n_tokens(vocab)
    result = {
        "vocab_size": count,
        "eos": lib.llama_vocab_eos(vocab),
        "ends": [token for token in range(count) if lib.llama_vocab_is_eog(vocab, token)],
        "ids": [_tokenize(vocab, text) for text in job["prompts"]],
    }
    context_params = lib.llama_context_default_params()
    context_params.n_ctx = context_params.n_batch = context_params.n_ubatch = 32
    context_params.n_threads = context_params.n_threads_batch = job["threads"]
    context = lib.llama_init_from_model(model, context_params)
    if not context:
        raise SystemExit("llama.cpp cannot make a context for the file")
    token = (ctypes.c_int32 * 1)(max(0, result["eos"]))
    if lib.llama_decode(context, lib.llama_batch_get_one(token, 1)) != 0:
        raise SystemExit("llama.cpp cannot decode a token with the file")
    logits = lib.llama_get_logits_ith(context, -1)
    if not all(math.isfinite(logits[index]) for index in range(count)):
        raise SystemExit("the file gives logits that are not finite numbers")
    return result


if __name__ == "__main__":
    run = {"quantize": quantize, "inspect": inspect}[sys.argv[1]]
    answer = run(json.loads(sys.stdin.buffer.read().decode("utf-8")))
    sys.stdout.buffer.write(json.dumps(answer).encode("utf-8"))
