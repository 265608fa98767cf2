"""The KV cache of an ONNX model: rows of one buffer, one for each slot, and which slot lies in which row.

A session runs a batch over a window of neighbouring rows, because a tensor lies in one piece. Requests come
and go, so the slots that decode do not stay neighbours: rows between them are run along for nothing, or slots
change rows, which copies their cells. `window` runs along until that has cost as much as the copying.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A row that is run along for one step costs about as much as copying so many tokens' cells: about 4 ms
# against 14 us a token with 135 million parameters; the more parameters, the more tokens.
TOKENS_OF_A_ROW = 256


class Placement:
    """Which slot lies in which row; `_swap` is told when two are to change places.

    shape: of one row of one part (heads, room, width); parts: a key and a value for each layer.
    """

    device: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    parts: int

    def __init__(self, slots: int, room: int) -> None:
        self._room = room
        self._row_of = list(range(slots))
        self._run_along = 0

    def row(self, slot: int) -> int:
        return self._row_of[slot]

    def window(self, slots: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
        """(first row, rows) of a window that holds `slots`; it may move them. lengths: tokens of each slot.

        Other slots in the window have room for one token more.
        """
        rows = sorted(self._row_of[slot] for slot in slots)
        first, count = rows[0], rows[-1] - rows[0] + 1
        idle = count - len(rows)
        if idle == 0:
            return first, count
        self._run_along += idle
        wanted = set(slots)
        cost, first = min(
            (self._cost(wanted, at, lengths), at) for at in range(len(self._row_of) - len(rows) + 1)
        )
        others = [
            slot for slot, row in enumerate(self._row_of) if slot not in wanted and rows[0] < row < rows[-1]
        ]
        full = any(lengths[slot] >= self._room for slot in others)
        if not full and self._run_along < cost:
            return rows[0], count
        self._run_along = 0
        inside = range(first, first + len(rows))
        leave = [slot for slot, row in enumerate(self._row_of) if row in inside and slot not in wanted]
        come = [slot for slot in slots if self._row_of[slot] not in inside]
        for a, b in zip(leave, come, strict=True):
            self._swap(self._row_of[a], self._row_of[b], lengths[a], lengths[b])
            self._row_of[a], self._row_of[b] = self._row_of[b], self._row_of[a]
        return first, len(rows)

    def _cost(self, wanted: set[int], first: int, lengths: Sequence[int]) -> float:
        """What it costs until `wanted` lie in the rows from `first` on, in rows run along for a step."""
        inside = range(first, first + len(wanted))
        return sum(
            self._worth(length)
            for slot, length in enumerate(lengths)
            if (slot in wanted) != (self._row_of[slot] in inside)
        )

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Keys and values of `count` rows from `first` on, as a run's inputs and, in place, its outputs."""
        shape, kind = (count, *self.shape), self.dtype.type
        for part in range(self.parts):
            name, pointer = f"{part // 2}.{('key', 'value')[part % 2]}", self.pointer(part, first)
            binding.bind_input(f"past_key_values.{name}", self.device, 0, kind, shape, pointer)
            binding.bind_output(f"present.{name}", self.device, 0, kind, shape, pointer)

    def pointer(self, part: int, row: int) -> int:
        """The address of `row` in `part`: 2 x layer for keys, one more for values."""
        raise NotImplementedError

    def _worth(self, length: int) -> float:
        """What moving `length` tokens costs, in rows run along for a step."""
        return length / TOKENS_OF_A_ROW

    def _swap(self, a: int, b: int, n: int, m: int) -> None:
        """Exchange the first `n` tokens of row `a` and the first `m` of row `b`."""
        raise NotImplementedError


class Rows(Placement):
    """Cells in memory: [2 x layers, rows, heads, room, width], key and value of a layer after each other.

    The system gives pages when they are first written, so that a slot takes what its longest text took.
    """

    device = "cpu"

    def __init__(self, *, layers: int, slots: int, heads: int, room: int, width: int, dtype: str) -> None:
        super().__init__(slots, room)
        shape = (2 * layers, slots, heads, room, width)
        self.shape, self.dtype, self.parts = (heads, room, width), np.dtype(dtype), 2 * layers
        self._memory = mmap.mmap(-1, int(np.prod(shape)) * self.dtype.itemsize)
        # Huge pages would take memory for cells that are never used.
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with contextlib.suppress(OSError):
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.cells: NDArray[np.generic] = np.frombuffer(self._memory, self.dtype).reshape(shape)

    def pointer(self, part: int, row: int) -> int:
        strides = self.cells.strides
        return int(self.cells.ctypes.data + part * strides[0] + row * strides[1])

    def _swap(self, a: int, b: int, n: int, m: int) -> None:
        kept = self.cells[:, a, :, :n].copy()
        self.cells[:, a, :, :m] = self.cells[:, b, :, :m]
        self.cells[:, b, :, :n] = kept

    def copy(self, src: int, dst: int, n: int) -> None:
        """The first `n` tokens of slot `src` to slot `dst`."""
        self.cells[:, self._row_of[dst], :, :n] = self.cells[:, self._row_of[src], :, :n]

    def save(self, slot: int, n: int) -> bytes:
        return self.cells[:, self._row_of[slot], :, :n].tobytes()

    def restore(self, slot: int, cells: bytes, n: int) -> bool:
        """Cells that `save` gave for `n` tokens. False where their number is another."""
        parts, _, heads, room, width = self.cells.shape
        if not 0 < n <= room or len(cells) != parts * heads * n * width * self.cells.itemsize:
            return False
        found = np.frombuffer(cells, self.cells.dtype).reshape(parts, heads, n, width)
        self.cells[:, self._row_of[slot], :, :n] = found
        return True

    def close(self) -> None:
        """Give the memory back. No session may run afterwards."""
        self.cells = np.zeros((0, 0, 0, 0, 0), self.dtype)
        with contextlib.suppress(BufferError):
            self._memory.close()
