"""The roof: llama.cpp decoding with nothing around it, through llama-cpp-python's low-level bindings.

Greedy, argmax by numpy, one thread, no server: `streams` sequences are prefilled one after the other and then
advance together, one token each in every llama_decode. What a server reaches is measured against this.

    python -m bench.engines.bare_llamacpp MODEL.gguf --streams 1,8,16 --kv-unified on,off --flash-attention on,off

Prints a line per run and, last, one line of JSON. With several settings the runs are interleaved
(`--repeats` times over all of them) and the medians are what counts. One stream's decoding is also told as a
share of what the memory allows, which is read right before and after each run.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import roofline
from bench.measure.metrics import median
from edge.artefact.gguf_shards import read_whole
from edge.backends.llamacpp import library, native_errors
from edge.console import guarded
from edge.errors import InputError, UsageError
from edge.machine import hardware


@dataclass(frozen=True)
class Setting:
    """One way to run. n_ctx: cells of the whole cache (shared by the streams, or divided among them)."""

    streams: int
    n_ctx: int
    threads: int
    flash_attention: bool
    kv_unified: bool


class Bare:
    """A model file, loaded once for all settings.

    Raises InputError for a file that llama.cpp cannot load, UnavailableError without the library.

    gpu: put all of its layers on the card.
    """

    def __init__(self, path: Path, *, gpu: bool = False) -> None:
        if not path.is_file():
            raise InputError(f"no such file: {path}", "give a .gguf file")
        self._lib = lib = library()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = -1 if gpu else 0
        with native_errors() as log:
            self._model: Any = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise InputError(f"llama.cpp cannot load {path}: {log.tail()}", "export the file again")
        self.vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))

    def close(self) -> None:
        self._lib.llama_model_free(self._model)

    def run(self, setting: Setting, *, prompt: int, new: int, seed: int = 0) -> dict[str, float]:
        """Tokens/s of prefill (all streams' prompts) and of decoding (all streams together).

        prompt: tokens of each prompt, drawn at random by `seed`, for time does not depend on what they say.
        new: tokens decoded for each stream after the first, which comes out of the prefill.
        """
        lib, streams = self._lib, setting.streams
        params = lib.llama_context_default_params()
        params.n_ctx = setting.n_ctx
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = setting.threads
        params.flash_attn_type = int(setting.flash_attention)
        params.kv_unified = setting.kv_unified
        params.no_perf = True
        need = streams * (prompt + new)
        if setting.n_ctx < need or prompt > 512:
            raise UsageError(f"--ctx {setting.n_ctx} and a batch of 512 do not hold {need} tokens")
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise UsageError(f"llama.cpp refuses {setting}", "try a smaller --ctx")
        batch = lib.llama_batch_init(512, 0, 1)
        try:
            return self._measure(context, batch, streams, prompt, new, seed)
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)

    def _measure(
        self, context: Any, batch: Any, streams: int, prompt: int, new: int, seed: int
    ) -> dict[str, float]:
        tokens = np.random.default_rng(seed).integers(100, self.vocab - 100, (streams, prompt))
        last = np.zeros(streams, np.int64)
        began = time.perf_counter()
        for stream in range(streams):
            rows = [(int(token), at, stream, at == prompt - 1) for at, token in enumerate(tokens[stream])]
            last[stream] = self._decode(context, batch, rows, 1)[0]
        middle = time.perf_counter()
        for step in range(new):
            rows = [(int(last[stream]), prompt + step, stream, True) for stream in range(streams)]
            last = self._decode(context, batch, rows, streams)
        end = time.perf_counter()
        return {
            "prefill_tokens_per_s": streams * prompt / (middle - began),
            "decode_tokens_per_s": streams * new / (end - middle),
            # What a closed loop of such clients would see: prompts read, then answers made.
            "total_tokens_per_s": streams * (new + 1) / (end - began),
        }

    def _decode(self, context: Any, batch: Any, rows: list[tuple[int, int, int, bool]], outputs: int) -> Any:
        """One llama_decode; the most likely next token of each row that asked for logits."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        code = self._lib.llama_decode(context, batch)
        assert code == 0, f"llama_decode gave {code}"
        pointer = ctypes.cast(self._lib.llama_get_logits(context), ctypes.c_void_p).value
        assert pointer is not None
        flat = np.frombuffer((ctypes.c_float * (outputs * self.vocab)).from_address(pointer), np.float32)
        return flat.reshape(outputs, self.vocab).argmax(axis=1)


def sweep(
    path: Path, settings: list[Setting], *, prompt: int, new: int, repeats: int
) -> list[dict[str, Any]]:
    """Every setting `repeats` times, interleaved, after a discarded warm-up; medians and samples."""
    footprint = roofline.of_gguf(read_whole(path))
    bare = Bare(path)

    def run(setting: Setting, seed: int) -> dict[str, float]:
        if setting.streams > 1:
            return bare.run(setting, prompt=prompt, new=new, seed=seed)
        before = roofline.reading(footprint.probed, setting.threads)
        found = bare.run(setting, prompt=prompt, new=new, seed=seed)
        memory = roofline.better(before, roofline.reading(footprint.probed, setting.threads))
        most = roofline.ceiling(memory, footprint.per_token(roofline.context_of([prompt], new)))
        return found | {"memory_share": found["decode_tokens_per_s"] / most}

    try:
        bare.run(settings[0], prompt=prompt, new=8)
        runs: list[list[dict[str, float]]] = [[] for _ in settings]
        for repeat in range(repeats):
            for setting, found in zip(settings, runs, strict=True):
                found.append(run(setting, repeat))
    finally:
        bare.close()
    return [
        asdict(setting)
        | {name: median([run[name] for run in found]) for name in found[0]}
        | {"samples": found}
        for setting, found in zip(settings, runs, strict=True)
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines.bare_llamacpp", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("--streams", default="1", help="sequences decoded together, a list such as 1,8,16")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of each prompt (at most 512)")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded for each stream")
    parser.add_argument("--ctx", type=int, help="cells of the KV cache (default: what the streams need)")
    parser.add_argument("--threads", type=int, default=hardware.cpu_threads())
    parser.add_argument("--flash-attention", default="off", help="on, off or on,off")
    parser.add_argument("--kv-unified", default="on", help="on, off or on,off")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    for name in ("prompt", "new", "threads", "repeats"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1")
    settings = []
    for streams, unified, flash in itertools.product(
        counts(args.streams),
        switches("--kv-unified", args.kv_unified),
        switches("--flash-attention", args.flash_attention),
    ):
        # Cells are handed out in steps of 256 a stream where each has its own part.
        each = -(-(args.prompt + args.new + 1) // 256) * 256
        settings.append(Setting(streams, args.ctx or streams * each, args.threads, flash, unified))
    found = sweep(args.model, settings, prompt=args.prompt, new=args.new, repeats=args.repeats)
    for row in found:
        sys.stdout.write(
            f"streams {row['streams']:>3}  kv_unified {'on ' if row['kv_unified'] else 'off'}  "
            f"flash attention {'on ' if row['flash_attention'] else 'off'}  "
            f"prefill {row['prefill_tokens_per_s']:7.1f}  decode {row['decode_tokens_per_s']:7.1f}  "
            f"total {row['total_tokens_per_s']:7.1f} tok/s"
            + (f"  {row['memory_share']:.0%} of what the memory allows" if "memory_share" in row else "")
            + "\n"
        )
    sys.stdout.write(json.dumps({"model": args.model.name, "runs": found}) + "\n")
    return 0


def counts(text: str) -> list[int]:
    """`"1,8"` -> [1, 8]. Raises UsageError for anything but positive whole numbers."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"'{text}' is not a list of positive whole numbers such as 1,8")
    return [int(word) for word in words]


def switches(name: str, text: str) -> list[bool]:
    words = text.split(",")
    if not set(words) <= {"on", "off"}:
        raise UsageError(f"{name} {text}: give on, off or on,off")
    return [word == "on" for word in words]


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
