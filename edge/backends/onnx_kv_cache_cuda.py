"""The KV cache of an ONNX model in a GPU's memory; see onnx_kv_cache.

onnxruntime's Python interface allocates memory on a device but cannot copy parts of it. A graph of Identity
nodes, one for each part, can: bound to addresses within the buffers it copies there, or to and from the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.onnx_kv_cache import KVCache

# The cost of moving a row, in idle rows of one step.
_MOVE = 25.0
# TensorProto.DataType.
_KINDS = {"float32": 1, "float16": 10}

_Places = list[tuple[str, int]]


class DeviceKVCache(KVCache):
    """On `device` (onnxruntime's name: cuda), [rows, heads, room, width] for each part.

    All of it is allocated at once. There is one row more than slots, through which two rows change places.
    """

    def __init__(self, runtime: Any, provider: str, device: str, *, slots: int, **shape: Any) -> None:
        super().__init__(slots=slots, **shape)
        self.device = device
        whole = (slots + 1, *self.shape)
        allocate = runtime.OrtValue.ortvalue_from_shape_and_type
        self._parts = [allocate(whole, self.dtype.type, device, 0) for _ in range(self.parts)]
        self._row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self._spare = slots
        graph = identity(_KINDS[self.dtype.name], self.parts)
        providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
        self._copier = runtime.InferenceSession(graph, providers=providers)

    def pointer(self, part: int, row: int) -> int:
        return int(self._parts[part].data_ptr()) + row * self._row_bytes

    def copy(self, src: int, dst: int, n: int) -> None:
        if n:
            self._copy(self._places(self.row(src)), self._places(self.row(dst)))

    def save(self, slot: int, n: int) -> bytes:
        host = self._host()
        self._copy(self._places(self.row(slot)), _addresses(host))
        return host[:, :, :n].tobytes()

    def close(self) -> None:
        self._parts = []
        self._copier = None

    def _write(self, slot: int, cells: NDArray[Any]) -> None:
        host = self._host()
        host[:, :, : cells.shape[2]] = cells
        self._copy(_addresses(host), self._places(self.row(slot)))

    def _move_cost(self, length: int) -> float:
        # Binding what is copied takes longer than copying it, and an idle row is nearly free to compute.
        return _MOVE if length else 0.0

    def _swap(self, a: int, b: int, n: int, m: int) -> None:
        # Whole rows: one copy on the device is faster than many calls.
        if n:
            self._copy(self._places(a), self._places(self._spare))
        if m:
            self._copy(self._places(b), self._places(a))
        if n:
            self._copy(self._places(self._spare), self._places(b))

    def _host(self) -> NDArray[Any]:
        return np.zeros((self.parts, *self.shape), self.dtype)

    def _places(self, row: int) -> _Places:
        return [(self.device, self.pointer(part, row)) for part in range(self.parts)]

    def _copy(self, sources: _Places, targets: _Places) -> None:
        """Copy a row's bytes of every part between addresses, each with its device."""
        binding = self._copier.io_binding()
        size, kind = (int(np.prod(self.shape)),), self.dtype.type
        for part, (source, target) in enumerate(zip(sources, targets, strict=True)):
            binding.bind_input(f"x{part}", source[0], 0, kind, size, source[1])
            binding.bind_output(f"y{part}", target[0], 0, kind, size, target[1])
        binding.synchronize_inputs()
        self._copier.run_with_iobinding(binding)
        binding.synchronize_outputs()


def _addresses(host: NDArray[Any]) -> _Places:
    return [("cpu", int(array.ctypes.data)) for array in host]


def identity(kind: int, count: int) -> bytes:
    """An ONNX model of `count` copies `y0 = Identity(x0)`, of vectors of the element type `kind`.

    Field numbers are those of onnx.proto3.
    """

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        length, rest = b"", len(value)
        while rest > 127:
            length, rest = length + bytes([rest & 127 | 128]), rest >> 7
        return bytes([number << 3 | 2]) + length + bytes([rest]) + value

    def vector(name: bytes) -> bytes:
        shape = field(1, field(2, b"n"))
        return field(1, name) + field(2, field(1, field(1, kind) + field(2, shape)))

    nodes = inputs = outputs = b""
    for part in range(count):
        x, y = b"x%d" % part, b"y%d" % part
        nodes += field(1, field(1, x) + field(2, y) + field(4, b"Identity"))
        inputs, outputs = inputs + field(11, vector(x)), outputs + field(12, vector(y))
    graph = nodes + field(2, b"copy") + inputs + outputs
    return field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 13))
