"""The KV cache of an ONNX model in the memory of a device; see onnx_rows.

onnxruntime's Python interface allots memory on a device but copies no part of it. A graph of Identities, one
for each part, does: bound to addresses within the buffers it is a copy there, or to and from the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.onnx_kv_cache import Placement

# What moving a row costs, in rows that are run along for one step.
_MOVE = 25.0
# TensorProto.DataType.
_KINDS = {"float32": 1, "float16": 10}


class DeviceRows(Placement):
    """Cells on `device` (onnxruntime's name: cuda), [rows, heads, room, width] for each key and value.

    All of it is allotted at once. One row more than slots is there, through which two rows change places.
    """

    def __init__(
        self,
        runtime: Any,
        provider: str,
        device: str,
        *,
        layers: int,
        slots: int,
        heads: int,
        room: int,
        width: int,
        dtype: str,
    ) -> None:
        super().__init__(slots, room)
        self.device = device
        self.shape, self.dtype, self.parts = (heads, room, width), np.dtype(dtype), 2 * layers
        whole = (slots + 1, *self.shape)
        allot = runtime.OrtValue.ortvalue_from_shape_and_type
        self._parts = [allot(whole, self.dtype.type, device, 0) for _ in range(self.parts)]
        self._row_bytes = heads * room * width * self.dtype.itemsize
        self._spare = slots
        providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
        self._copier = runtime.InferenceSession(identity(_KINDS[dtype], self.parts), providers=providers)

    def pointer(self, part: int, row: int) -> int:
        return int(self._parts[part].data_ptr()) + row * self._row_bytes

    def _worth(self, length: int) -> float:
        # Binding what is copied takes longer than copying it, and a row more is nearly free to compute.
        return _MOVE if length else 0.0

    def _swap(self, a: int, b: int, n: int, m: int) -> None:
        # Whole rows: a copy on the device is quicker than many calls.
        if n:
            self._copy(self._places(a), self._places(self._spare))
        if m:
            self._copy(self._places(b), self._places(a))
        if n:
            self._copy(self._places(self._spare), self._places(b))

    def copy(self, src: int, dst: int, n: int) -> None:
        """The first `n` tokens of slot `src` to slot `dst`; what lies behind them comes along."""
        if n:
            self._copy(self._places(self.row(src)), self._places(self.row(dst)))

    def save(self, slot: int, n: int) -> bytes:
        host = self._host()
        self._copy(self._places(self.row(slot)), _addresses(host))
        return host[:, :, :n].tobytes()

    def restore(self, slot: int, cells: bytes, n: int) -> bool:
        """Cells that `save` gave for `n` tokens. False where their number is another."""
        heads, room, width = self.shape
        if not 0 < n <= room or len(cells) != len(self._parts) * heads * n * width * self.dtype.itemsize:
            return False
        host = self._host()
        host[:, :, :n] = np.frombuffer(cells, self.dtype).reshape(-1, heads, n, width)
        self._copy(_addresses(host), self._places(self.row(slot)))
        return True

    def close(self) -> None:
        """Give the memory back. No session may run afterwards."""
        self._parts = []
        self._copier = None

    def _host(self) -> NDArray[np.generic]:
        return np.zeros((len(self._parts), *self.shape), self.dtype)

    def _places(self, row: int) -> list[tuple[str, int]]:
        return [(self.device, self.pointer(part, row)) for part in range(self.parts)]

    def _copy(self, sources: list[tuple[str, int]], targets: list[tuple[str, int]]) -> None:
        """Copy a row's bytes of every part between addresses, each with its device."""
        binding = self._copier.io_binding()
        size, kind = (int(np.prod(self.shape)),), self.dtype.type
        for part, (source, target) in enumerate(zip(sources, targets, strict=True)):
            binding.bind_input(f"x{part}", source[0], 0, kind, size, source[1])
            binding.bind_output(f"y{part}", target[0], 0, kind, size, target[1])
        binding.synchronize_inputs()
        self._copier.run_with_iobinding(binding)
        binding.synchronize_outputs()


def _addresses(host: NDArray[np.generic]) -> list[tuple[str, int]]:
    return [("cpu", int(array.ctypes.data)) for array in host]


def identity(kind: int, count: int) -> bytes:
    """An ONNX model of `count` copies `y0 = Identity(x0)`, of vectors of the element type `kind`
    (onnx.proto3).
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
