"""What a run of a session reads and writes, kept from run to run: what lies where it lay is not bound again.

A decoding step changes nothing but the length of its mask; telling onnxruntime everything anew, through
Python, costs more than a percent of a small model's step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Buffer:
    """An array that stays where it is."""

    __slots__ = ("address", "array", "constant", "row_bytes")

    def __init__(self, array: NDArray[Any], *, constant: bool = False) -> None:
        self.array = array
        self.constant = constant
        self.address = int(array.ctypes.data)
        self.row_bytes = int(array.strides[0])


class Binding:
    """native: onnxruntime's IOBinding. copied: inputs are copied to a device when they are bound, so each
    run has to bind them.
    """

    __slots__ = ("_bound", "_copied", "native")

    def __init__(self, native: Any, *, copied: bool) -> None:
        self.native = native
        self._copied = copied
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def read(self, name: str, buffer: Buffer, shape: tuple[int, ...]) -> None:
        """Let the input `name` be the beginning of `buffer`."""
        place = (buffer.address, shape)
        if (self._copied and not buffer.constant) or self._bound.get(name) != place:
            self.native.bind_input(name, "cpu", 0, buffer.array.dtype.type, shape, buffer.address)
            self._bound[name] = place

    def write(self, name: str, buffer: Buffer, row: int, shape: tuple[int, ...]) -> None:
        """Let the output `name` go to `buffer` from `row` on."""
        place = (buffer.address + row * buffer.row_bytes, shape)
        if self._bound.get(name) != place:
            self.native.bind_output(name, "cpu", 0, buffer.array.dtype.type, shape, place[0])
            self._bound[name] = place


def zeros(*shape: int, kind: Any = np.int64) -> Buffer:
    return Buffer(np.zeros(shape, kind))
