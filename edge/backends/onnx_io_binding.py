"""The inputs and outputs of a session's runs, kept bound from run to run while they stay where they are.

A decode step changes nothing but the length of its mask. Binding everything again, through Python, costs more
than a percent of a small model's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The mask of a decode step fits so many steps.
_WIDTH = 64


class Buffer:
    """An array at a fixed address. flat: its numbers one by one, which is faster than through numpy.

    constant: its numbers never change.
    """

    __slots__ = ("address", "array", "constant", "flat", "row_bytes")

    def __init__(self, array: NDArray[Any], *, constant: bool = False) -> None:
        self.array = array
        self.flat = array.reshape(-1).data
        self.constant = constant
        self.address = int(array.ctypes.data)
        self.row_bytes = int(array.strides[0])


class Binding:
    """native: onnxruntime's IOBinding. copied: inputs are copied to a device when they are bound, so each
    run has to bind those that are not constant.
    """

    __slots__ = ("_bound", "_copied", "native")

    def __init__(self, native: Any, *, copied: bool) -> None:
        self.native = native
        self._copied = copied
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def read(self, name: str, buffer: Buffer, shape: tuple[int, ...]) -> None:
        """Bind the input `name` to the beginning of `buffer`."""
        place = (buffer.address, shape)
        if (self._copied and not buffer.constant) or self._bound.get(name) != place:
            self.native.bind_input(name, "cpu", 0, buffer.array.dtype.type, shape, buffer.address)
            self._bound[name] = place

    def write(self, name: str, buffer: Buffer, row: int, shape: tuple[int, ...]) -> None:
        """Bind the output `name` to `buffer` from `row` on."""
        place = (buffer.address + row * buffer.row_bytes, shape)
        if self._bound.get(name) != place:
            self.native.bind_output(name, "cpu", 0, buffer.array.dtype.type, shape, place[0])
            self._bound[name] = place


class Mask:
    """The attention mask of a run [rows, width]: ones for the tokens that each row has, then zeros.

    Attention takes its width for the longest row's length. For a decode step it may be wider, so that the
    next steps only set one more token in each row.
    """

    def __init__(self, slots: int, context: int) -> None:
        self.buffer = zeros(slots * context)
        self._context = context
        self._order = np.arange(context)
        self._totals: list[int] = []
        self._width = 0

    def set(self, totals: list[int], *, exact: bool) -> tuple[int, int]:
        """Set it for rows of `totals` tokens; returns its shape. exact: no wider than the longest row."""
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
