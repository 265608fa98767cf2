"""The physical limit: how many tokens a second the memory allows, beside how many were made.

Decoding one token reads every weight once. With B bytes of weights and KV cells read per token and a read
bandwidth of W bytes/s, one stream makes at most W / B tokens/s (Williams, Waterman, Patterson 2009: the
memory-bound side of the roofline). The bandwidth is that of this machine, read at the model's size and with
the threads that serve it: a model that fits into a cache is read faster than one that does not.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge.gguf_header import GGUFHeader

KV_F16_BYTES = 2.0


@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidth in bytes/s: the best pass and the median one. size: bytes read in a pass."""

    best: float
    median: float
    size: int
    threads: int


def bandwidth(size: int, threads: int, *, seconds: float = 1.0) -> Bandwidth:
    """Read `size` bytes again and again with `threads` threads for `seconds`; at least three passes.

    The kernel is numpy's maximum over 64-bit integers: vector loads, no stores, and it lets go of the GIL.
    """
    share = max(size // threads // 8, 1)
    parts = [np.ones(share, np.int64) for _ in range(threads)]
    begin, end = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
    stop = False

    def read(part: np.ndarray) -> None:
        while True:
            begin.wait()
            if stop:
                return
            part.max()
            end.wait()

    workers = [threading.Thread(target=read, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    rates: list[float] = []
    until = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        begin.wait()
        end.wait()
        rates.append(8 * share * threads / (time.perf_counter() - began))
    stop = True
    begin.wait()
    for worker in workers:
        worker.join()
    return Bandwidth(max(rates), statistics.median(rates), 8 * share * threads, threads)


def bytes_per_token(header: GGUFHeader, context: float, *, kv_bytes: float = KV_F16_BYTES) -> int:
    """Bytes read to decode one token of one stream, with `context` tokens before it.

    All weights, but of an embedding that is not also the output only one row; the keys and values of the
    context, `kv_bytes` each element.
    """
    table = header.tensors.get("token_embd.weight")
    untied = table is not None and "output.weight" in header.tensors
    weights = header.weights_bytes - (table.bytes if untied and table else 0)
    heads = header.head_count_kv * (header.key_length + header.value_length)
    return int(weights + header.block_count * heads * kv_bytes * context)


def ceiling(found: Bandwidth, per_token: int) -> float:
    """Tokens/s of one stream that the best pass of the memory allows."""
    return found.best / per_token


def context_of(prompt_tokens: Sequence[int], output_tokens: int) -> float:
    """The mean number of tokens before each token decoded."""
    return statistics.fmean(prompt_tokens) + output_tokens / 2
