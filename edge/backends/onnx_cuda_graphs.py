"""Decode steps on a GPU as captured CUDA graphs: one launch in place of a launch for each kernel.

A step of a small model launches some thousand kernels, and launching them takes longer than running them. A
captured CUDA graph repeats what a run did, at the same addresses and of the same shape. So its inputs and
outputs lie in buffers of its own on the GPU, the rows of the batch are padded to a power of two, and the mask
to a length that holds for many steps. onnxruntime never frees a captured graph, so there are few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.artefact.onnx_header import OUTPUT_POSITIONS, OnnxHeader
from edge.backends.onnx_kv_cache_cuda import DeviceKVCache
from edge.backends.onnx_logits import tensors

# Steps of one shape before it is captured, which takes about as long as some of them.
_AFTER = 8
_MOST = 32
_LEAST_WIDTH = 256
# The run option that names the CUDA graph of a run; -1 is none.
GRAPH = "gpu_graph_id"


@dataclass(frozen=True, slots=True)
class Shape:
    """A decode step of `count` rows from `first` on, of up to `longest` tokens each.

    few: its outputs are candidates.
    """

    first: int
    count: int
    longest: int
    few: bool


@dataclass(frozen=True, slots=True)
class Source:
    """What graphs are captured from: a session that allows it, and the KV cache that it runs over."""

    runtime: Any
    session: Any
    cache: DeviceKVCache
    header: OnnxHeader


def span(first: int, count: int, slots: int) -> tuple[int, int]:
    """The rows (first, count) to run for those asked for: a power of two of them, or all."""
    whole = min(1 << (count - 1).bit_length(), slots)
    return min(first, slots - whole), whole


def width(longest: int, context: int) -> int:
    """The length of the mask for rows of up to `longest` tokens."""
    return min(max(_LEAST_WIDTH, 1 << (longest - 1).bit_length()), context)


class CudaGraph:
    """The graph of a step; captured at its first run. number: its id in the session, from 1 on."""

    def __init__(self, source: Source, shape: Shape, number: int) -> None:
        self.shape = shape
        self.captured = False
        self._session = source.session
        cache, value = source.cache, source.runtime.OrtValue

        def allocate(kind: Any, *size: int) -> Any:
            return value.ortvalue_from_shape_and_type(size, np.dtype(kind).type, cache.device, 0)

        self._ids = allocate(np.int64, shape.count, 1)
        self._mask = allocate(np.int64, shape.count, shape.longest)
        # Bound below, and kept alive here.
        self._position = value.ortvalue_from_numpy(np.zeros(1, np.int64), cache.device, 0)
        outputs = {
            name: allocate(kind, shape.count, 1, width)
            for name, (kind, width) in tensors(source.header, shape.few).items()
        }
        self._outputs = list(outputs.values())
        self._order = np.arange(shape.longest, dtype=np.int64)
        self._binding = source.session.io_binding()
        inputs = {"input_ids": self._ids, "attention_mask": self._mask, OUTPUT_POSITIONS: self._position}
        for name, tensor in inputs.items():
            self._binding.bind_ortvalue_input(name, tensor)
        cache.bind(self._binding, shape.first, shape.count)
        for name, tensor in outputs.items():
            self._binding.bind_ortvalue_output(name, tensor)
        self._options = source.runtime.RunOptions()
        self._options.add_run_config_entry(GRAPH, str(number))

    def run(self, ids: NDArray[np.int64], totals: Sequence[int]) -> list[NDArray[Any]]:
        """ids [count]; totals: tokens of each row then. The outputs, [count, ...] each, on the host."""
        self._ids.update_inplace(ids[:, None])
        self._mask.update_inplace((self._order < np.array(totals)[:, None]).astype(np.int64))
        self._session.run_with_iobinding(self._binding, self._options)
        self.captured = True
        return [tensor.numpy()[:, 0] for tensor in self._outputs]


class CudaGraphs:
    """The captured graphs of a session, by the shapes of steps that come often."""

    def __init__(self, source: Source, *, slots: int, context: int) -> None:
        self._source = source
        self._slots, self._context = slots, context
        self._seen: dict[Shape, int] = {}
        self._graphs: dict[Shape, CudaGraph] = {}

    def find(
        self, first: int, count: int, few: bool, totals: Callable[[int, int], list[int]]
    ) -> CudaGraph | None:
        """A graph that covers the `count` rows from `first` on; None while steps of its shape are rare.

        totals: tokens of each row of a span then. Every row of it needs room for them.
        """
        first, count = span(first, count, self._slots)
        longest = max(totals(first, count))
        if longest > self._context:
            return None
        shape = Shape(first, count, width(longest, self._context), few)
        if shape not in self._graphs:
            seen = self._seen[shape] = self._seen.get(shape, 0) + 1
            if seen <= _AFTER or len(self._graphs) == _MOST:
                return None
            self._graphs[shape] = CudaGraph(self._source, shape, len(self._graphs) + 1)
        return self._graphs[shape]
