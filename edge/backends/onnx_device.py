"""The KV cache of an ONNX model in the memory of a device; see onnx_rows.

onnxruntime's Python interface allots memory on a device but copies no part of it. A graph of one Identity
does: bound to addresses within the buffers it is a copy there, or to and from the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.onnx_rows import Placement

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
        self._copier = runtime.InferenceSession(identity(_KINDS[dtype]), providers=providers)

    def pointer(self, part: int, row: int) -> int:
        return int(self._parts[part].data_ptr()) + row * self._row_bytes

    def _swap(self, a: int, b: int, n: int, m: int) -> None:
        # Whole rows: a copy on the device is quicker than many calls.
        for source, target in ((a, self._spare), (b, a), (self._spare, b)):
            self._move(source, target)

    def copy(self, src: int, dst: int, n: int) -> None:
        """The first `n` tokens of slot `src` to slot `dst`; what lies behind them comes along."""
        if n:
            self._move(self.row(src), self.row(dst))

    def save(self, slot: int, n: int) -> bytes:
        host = self._host()
        for part, array in enumerate(host):
            self._run((self.device, self.pointer(part, self.row(slot))), ("cpu", array.ctypes.data))
        return host[:, :, :n].tobytes()

    def restore(self, slot: int, cells: bytes, n: int) -> bool:
        """Cells that `save` gave for `n` tokens. False where their number is another."""
        heads, room, width = self.shape
        if not 0 < n <= room or len(cells) != len(self._parts) * heads * n * width * self.dtype.itemsize:
            return False
        host = self._host()
        host[:, :, :n] = np.frombuffer(cells, self.dtype).reshape(-1, heads, n, width)
        for part, array in enumerate(host):
            self._run(("cpu", array.ctypes.data), (self.device, self.pointer(part, self.row(slot))))
        return True

    def close(self) -> None:
        """Give the memory back. No session may run afterwards."""
        self._parts = []
        self._copier = None

    def _host(self) -> NDArray[np.generic]:
        return np.zeros((len(self._parts), *self.shape), self.dtype)

    def _move(self, source: int, target: int) -> None:
        for part in range(len(self._parts)):
            self._run((self.device, self.pointer(part, source)), (self.device, self.pointer(part, target)))

    def _run(self, source: tuple[str, int], target: tuple[str, int]) -> None:
        """Copy a row's bytes between two addresses, each with its device."""
        binding = self._copier.io_binding()
        size = (int(np.prod(self.shape)),)
        binding.bind_input("x", source[0], 0, self.dtype.type, size, source[1])
        binding.bind_output("y", target[0], 0, self.dtype.type, size, target[1])
        binding.synchronize_inputs()
        self._copier.run_with_iobinding(binding)
        binding.synchronize_outputs()


def identity(kind: int) -> bytes:
    """An ONNX model `y = Identity(x)` over a vector of the element type `kind` (onnx.proto3)."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        return bytes([number << 3 | 2, len(value)]) + value

    def vector(name: bytes) -> bytes:
        shape = field(1, field(2, b"n"))
        return field(1, name) + field(2, field(1, field(1, kind) + field(2, shape)))

    node = field(1, b"x") + field(2, b"y") + field(4, b"Identity")
    graph = field(1, node) + field(2, b"copy") + field(11, vector(b"x")) + field(12, vector(b"y"))
    return field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 13))
