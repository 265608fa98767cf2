"""What a run of a session reads and writes, kept from run to run: what lies where it lay is not bound again.

A decoding step changes nothing but the length of its mask; telling onnxruntime everything anew, through
Python, costs more than a percent of a small model's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A decoding step's mask holds for so many steps.
_WIDTH = 64


class Buffer:
    """An array that stays where it is. flat: its numbers one by one, which is quicker than through numpy."""

    __slots__ = ("address", "array", "constant", "flat", "row_bytes")

    def __init__(self, array: NDArray[Any], *, constant: bool = False) -> None:
        self.array = array
        self.flat = array.reshape(-1).data
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


class Mask:
    """Which of its cells each row of a run's window may look at, [rows, width], the first ones of each.

    Its width is what attention takes for the longest row's length; a decoding step may be told of more, so
    that the next ones find the same mask with a token more in each row.
    """

    def __init__(self, slots: int, context: int) -> None:
        self.buffer = zeros(slots * context)
        self._context = context
        self._order = np.arange(context)
        self._totals: list[int] = []
        self._width = 0

    def set(self, totals: list[int], *, exact: bool) -> tuple[int, int]:
        """Rows of `totals` tokens; the mask's shape. exact: it is no wider than the longest."""
        before, longest = self._totals, max(totals)
        width = longest if exact else min(-(-longest // _WIDTH) * _WIDTH, self._context)
        if width == self._width and _follows(before, totals):
            for row, total in enumerate(totals):
                self.buffer.flat[row * width + total - 1] = 1
        else:
            grid = self.buffer.array[: len(totals) * width].reshape(len(totals), width)
            grid[:] = self._order[:width] < np.array(totals)[:, None]
        self._totals, self._width = totals, width
        return len(totals), width


def _follows(before: Sequence[int], totals: Sequence[int]) -> bool:
    """Whether each row has as many tokens as before, or one more."""
    return len(before) == len(totals) and all(
        0 <= total - old <= 1 for old, total in zip(before, totals, strict=True)
    )


def zeros(*shape: int, kind: Any = np.int64) -> Buffer:
    return Buffer(np.zeros(shape, kind))
