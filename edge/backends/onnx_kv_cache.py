"""The KV cache of an ONNX model: a row of one buffer for each slot, and which slot lies in which row.

A session runs a batch over a window of neighbouring rows, because a tensor lies in one piece. Requests come
and go, so the slots that decode do not stay neighbours. Then either the rows between them are computed too,
for nothing, or slots change rows, which copies their KV cells. `window` computes idle rows until that has
cost as much as the copying.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.base import Cells

# An idle row in one step costs about as much as copying the KV cells of so many tokens: about 4 ms against
# 14 us a token with 135 million parameters; the more parameters, the more tokens.
TOKENS_OF_A_ROW = 256


class KVCache(ABC):
    """room: tokens of a row. shape: of a row in one part [heads, room, width].

    parts: 2 x layers; keys and values of a layer after each other.
    """

    device = "cpu"

    def __init__(self, *, layers: int, slots: int, heads: int, room: int, width: int, dtype: str) -> None:
        self.shape, self.dtype, self.parts = (heads, room, width), np.dtype(dtype), 2 * layers
        self._row_of = list(range(slots))
        self._idle_rows = 0

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
        self._idle_rows += idle
        wanted = set(slots)
        starts = range(len(self._row_of) - len(rows) + 1)
        cost, first = min((self._cost(wanted, start, lengths), start) for start in starts)
        full = any(
            lengths[slot] >= self.shape[1]
            for slot, row in enumerate(self._row_of)
            if slot not in wanted and rows[0] < row < rows[-1]
        )
        if not full and self._idle_rows < cost:
            return rows[0], count
        self._idle_rows = 0
        inside = range(first, first + len(rows))
        leave = [slot for slot, row in enumerate(self._row_of) if row in inside and slot not in wanted]
        come = [slot for slot in slots if self._row_of[slot] not in inside]
        for a, b in zip(leave, come, strict=True):
            self._swap(self._row_of[a], self._row_of[b], lengths[a], lengths[b])
            self._row_of[a], self._row_of[b] = self._row_of[b], self._row_of[a]
        return first, len(rows)

    def _cost(self, wanted: set[int], first: int, lengths: Sequence[int]) -> float:
        """The cost of moving `wanted` to the rows from `first` on, in idle rows of a step."""
        inside = range(first, first + len(wanted))
        return sum(
            self._move_cost(length)
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

    def restore(self, slot: int, cells: Cells, n: int) -> bool:
        """Take what `save` gave for `n` tokens. False where the size is another."""
        heads, room, width = self.shape
        if not 0 < n <= room or len(cells) != self.parts * heads * n * width * self.dtype.itemsize:
            return False
        self._write(slot, np.frombuffer(cells, self.dtype).reshape(self.parts, heads, n, width))
        return True

    @abstractmethod
    def pointer(self, part: int, row: int) -> int:
        """The address of `row` in `part`."""

    @abstractmethod
    def copy(self, src: int, dst: int, n: int) -> None:
        """The first `n` tokens of slot `src` to slot `dst`; what lies behind them may come along."""

    @abstractmethod
    def save(self, slot: int, n: int) -> bytes:
        """The first `n` tokens of a slot: [parts, heads, n, width]."""

    @abstractmethod
    def close(self) -> None:
        """Free the memory. No session may run afterwards."""

    @abstractmethod
    def _write(self, slot: int, cells: NDArray[Any]) -> None:
        """`cells` [parts, heads, n, width] to a slot."""

    def _move_cost(self, length: int) -> float:
        """The cost of moving `length` tokens, in idle rows of a step."""
        return length / TOKENS_OF_A_ROW

    @abstractmethod
    def _swap(self, a: int, b: int, n: int, m: int) -> None:
        """Exchange the first `n` tokens of row `a` and the first `m` of row `b`."""


class HostKVCache(KVCache):
    """In the system's memory: [parts, slots, heads, room, width].

    The system provides pages when they are first written, so that a slot takes what its longest text took.
    """

    def __init__(self, *, slots: int, **shape: Any) -> None:
        super().__init__(slots=slots, **shape)
        whole = (self.parts, slots, *self.shape)
        self._memory = mmap.mmap(-1, int(np.prod(whole)) * self.dtype.itemsize)
        # Huge pages would take memory for KV cells that are never used.
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.cells: NDArray[Any] = np.frombuffer(self._memory, self.dtype).reshape(whole)

    def pointer(self, part: int, row: int) -> int:
        strides = self.cells.strides
        return int(self.cells.ctypes.data + part * strides[0] + row * strides[1])

    def copy(self, src: int, dst: int, n: int) -> None:
        self.cells[:, self._row_of[dst], :, :n] = self.cells[:, self._row_of[src], :, :n]

    def save(self, slot: int, n: int) -> bytes:
        return self.cells[:, self._row_of[slot], :, :n].tobytes()

    def close(self) -> None:
        self.cells = np.zeros((0, 0, 0, 0, 0), self.dtype)
        with contextlib.suppress(BufferError):
            self._memory.close()

    def _write(self, slot: int, cells: NDArray[Any]) -> None:
        self.cells[:, self._row_of[slot], :, : cells.shape[2]] = cells

    def _swap(self, a: int, b: int, n: int, m: int) -> None:
        kept = self.cells[:, a, :, :n].copy()
        self.cells[:, a, :, :m] = self.cells[:, b, :, :m]
        self.cells[:, b, :, :n] = kept
