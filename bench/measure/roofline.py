"""The physical limit: how many tokens a second the memory's bandwidth allows.

Decoding one token reads every weight once. With B bytes of weights and KV cells read per token and a read
bandwidth of W bytes/s, one stream makes at most W / B tokens/s (Williams, Waterman, Patterson 2009: the
memory-bound side of the roofline). The bandwidth is that of this machine, read at the model's size and with
the threads that serve it: a model that fits into a cache is read faster than one that does not.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.artefact.gguf_header import GGUFHeader
from edge.artefact.onnx_header import OnnxHeader
from edge.machine import hardware

KV_F16_BYTES = 2.0
# Bytes that are read to measure the memory. More would be read no faster, less would be read faster than
# threads can start.
LEAST_PROBED, MOST_PROBED = 16 * 2**20, 2 * 2**30


@dataclass(frozen=True, order=True)
class Bandwidth:
    """Read bandwidth in bytes/s: the best pass and the median one. size: bytes read in a pass.

    threads: of the processor; 0 for a GPU. The greater of two readings is the one with the better best pass.
    """

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
    rates: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        until = time.perf_counter() + seconds
        while len(rates) < 3 or time.perf_counter() < until:
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            rates.append(8 * share * threads / (time.perf_counter() - began))
    return Bandwidth(max(rates), statistics.median(rates), 8 * share * threads, threads)


def reading(size: int, threads: int) -> Bandwidth:
    """A short reading, right before or after a run, of `size` bytes or a quarter of the free memory."""
    room = max(hardware.memory().available // 4, LEAST_PROBED)
    return bandwidth(min(size, room), threads, seconds=0.3)


@dataclass(frozen=True)
class Footprint:
    """What one stream reads to decode a token: the weights, and `cell` bytes for each token before it.

    Of an embedding that is not also the output only one row is read; it is not in `weights`.
    """

    weights: int
    cell: float

    def per_token(self, context: float) -> int:
        """Bytes, with `context` tokens before the one that is decoded."""
        return int(self.weights + self.cell * context)

    @property
    def probed(self) -> int:
        """Bytes to read when the memory is measured: as many as the weights have, within bounds."""
        return max(LEAST_PROBED, min(self.weights, MOST_PROBED))


def of_gguf(header: GGUFHeader, *, kv_bytes: float = KV_F16_BYTES) -> Footprint:
    """Of a GGUF file; keys and values have `kv_bytes` each element."""
    table = header.tensors.get("token_embd.weight")
    untied = table is not None and "output.weight" in header.tensors
    heads = header.head_count_kv * (header.key_length + header.value_length)
    weights = header.weights_bytes - (table.bytes if untied and table else 0)
    return Footprint(weights, header.block_count * heads * kv_bytes)


def of_merged(folder: Path, header: GGUFHeader, element: int) -> Footprint:
    """Of a transformers folder whose weights and cache are held with `element` bytes each (4: float32).

    header: of a GGUF of the same model, for its shape.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    count = table = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            head = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        sizes = {name: math.prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__"}
        count += sum(sizes.values())
        table += sum(size for name, size in sizes.items() if name.endswith("embed_tokens.weight"))
    # A tied head is stored once, as the embedding, and read whole.
    weights = count - (0 if config.get("tie_word_embeddings") else table)
    return Footprint(weights * element, of_gguf(header, kv_bytes=float(element)).cell)


def of_onnx(header: OnnxHeader) -> Footprint | None:
    """Of an exported graph; None where the onnx package, which tells what its nodes read, is missing."""
    try:
        from onnx import helper, load
    except ImportError:
        return None
    graph = load(str(header.path), load_external_data=False).graph
    sizes = {
        tensor.name: math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
    }
    # Embeddings and the rotary table are read by rows.
    readers = [node for node in graph.node if not node.op_type.startswith(("Gather", "GroupQuery"))]
    whole = {name for node in readers for name in node.input}
    weights = sum(size for name, size in sizes.items() if name in whole)
    element = 2 if header.cache_type == "float16" else 4
    heads = header.head_count_kv * (header.key_length + header.value_length)
    return Footprint(weights, header.block_count * heads * element)


def gpu_bandwidth(size: int) -> Bandwidth | None:
    """Read bandwidth of the first GPU, by PyTorch in a process of its own; None without a GPU, or where
    PyTorch was built without CUDA.
    """
    if not hardware.gpus():
        return None
    command = [sys.executable, "-m", "bench.measure.gpu_bandwidth_child", str(size)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        return None
    return Bandwidth(**json.loads(done.stdout.splitlines()[-1]))


def ceiling(bandwidth: Bandwidth, per_token: int) -> float:
    """Tokens/s of one stream that the best pass of the memory allows."""
    return bandwidth.best / per_token


def context_of(prompt_tokens: Sequence[int], output_tokens: int) -> float:
    """The mean number of tokens before each token decoded."""
    return statistics.fmean(prompt_tokens) + output_tokens / 2
