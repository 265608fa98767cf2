"""Which tokens lie in which slot of the backend's KV cache, and who may use them again.

A request takes the slot that shares the longest prefix with its prompt; or a copy of that prefix, where the
slot is busy or its remainder is worth keeping. Idle slots keep their tokens until the room is needed; the
least recently used goes first, and leaves a copy in RAM where that is asked for (prefix_ram). In a unified KV
cache all slots draw on the same cells, and a cell that several slots hold counts once. With per-slot KV
buffers each slot has cells of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.backends.base import Backend, Cells
from edge.engine.prefix_ram import Kept, PrefixRam
from edge.engine.prefix_store import SHORTEST, PrefixStore, common

# Copying so many tokens takes longer than a step or so: it is done while nothing runs.
_LONG = 2048
# Fewer tokens than this, and than one in so many of a copy in RAM, are as quickly computed as copied.
_SHORTEST_IN_RAM, _COPIED_FOR_ONE = 16, 64


@dataclass(slots=True)
class Slot:
    """tokens[:length] lie in the cache; cells[:length] are the unified cache's cells that hold them."""

    tokens: NDArray[np.int32]
    cells: NDArray[np.int32]
    length: int = 0
    busy: bool = False
    used: int = 0


class KVCache:
    """The bookkeeping of a backend's slots. Every change goes through here, so that both agree."""

    def __init__(
        self, backend: Backend, store: PrefixStore | None = None, ram: PrefixRam | None = None
    ) -> None:
        self._backend = backend
        self._store = store
        self.ram = PrefixRam(0) if ram is None else ram
        info = backend.info
        self._shared = info.shared
        self._slots = [
            Slot(np.zeros(info.context, np.int32), np.zeros(info.context if info.shared else 0, np.int32))
            for _ in range(info.slots)
        ]
        self._holders = np.zeros(info.capacity if info.shared else 0, np.int32)
        # Cells of the unified cache that no slot holds.
        self._free = list(range(len(self._holders)))
        self._clock = itertools.count(1)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each slot holds."""
        return [slot.length for slot in self._slots]

    @property
    def busy(self) -> int:
        """Slots that a request owns."""
        return sum(slot.busy for slot in self._slots)

    def free_cells(self) -> int | None:
        """Cells of the unified cache that no slot holds; None with per-slot buffers."""
        return len(self._free) if self._shared else None

    def available_cells(self) -> int | None:
        """Cells that no running request holds: free ones and those of idle prefixes; None with per-slot
        buffers."""
        if not self._shared:
            return None
        held = np.zeros(len(self._holders), bool)
        for slot in self._slots:
            if slot.busy:
                held[slot.cells[: slot.length]] = True
        return len(held) - int(held.sum())

    def acquire(self, prompt: list[int], *, reuse: bool = True) -> tuple[int, int] | None:
        """Take a slot for `prompt`: (slot, tokens that need no computing), or None if all are busy.

        At least the prompt's last token is left to compute, since its logits are wanted.
        """
        idle = [i for i, slot in enumerate(self._slots) if not slot.busy]
        if not idle:
            return None
        wanted = np.asarray(prompt[:-1], np.int32)
        index, shared = self._spare(idle), 0
        kept: tuple[int, Kept] | None = None
        if reuse:
            # At equal length an idle slot is better: it needs no copy.
            shared, _, order = max(
                (common(slot.tokens[: slot.length], wanted), not slot.busy, -i)
                for i, slot in enumerate(self._slots)
            )
            best, source = -order, self._slots[-order]
            kept = self._in_ram(wanted, shared)
            if kept is not None:
                shared = 0
            elif shared and (source.busy or (2 * shared < source.length and index != best)):
                self._to_ram(index)
                self._copy(best, index, shared)
            elif shared:
                index = best
        slot = self._slots[index]
        slot.busy = True
        slot.used = next(self._clock)
        # What is cut off is less than what stays, or else it may be asked for again.
        if 2 * shared < slot.length:
            self._to_ram(index)
        self.truncate(index, shared)
        if kept is not None:
            self._from_ram(index, *kept)
        if reuse and self._store is not None:
            self._from_disk(self._store, index, wanted)
        return index, slot.length

    def _spare(self, idle: list[int]) -> int:
        """The idle slot to overwrite: an empty one, or the one that was used least recently.

        With per-slot buffers a step runs neighbours at once and others one after the other: a slot between
        busy ones comes first, then one beside them.
        """

        def order(i: int) -> tuple[int, bool, int]:
            slot = self._slots[i]
            beside = 0
            if not self._shared:
                beside = sum(self._slots[j].busy for j in (i - 1, i + 1) if 0 <= j < len(self._slots))
            return -beside, slot.length > 0, slot.used if slot.length else 0

        return min(idle, key=order)

    def keep_on_disk(self) -> int:
        """Store what the slots hold, the newest last; the number of prefixes that were kept."""
        if self._store is None:
            return 0
        newest_last = sorted(enumerate(self._slots), key=lambda item: item[1].used)
        return sum(
            self._store.save(slot.tokens[: slot.length], self._backend.save(index))
            for index, slot in newest_last
            if slot.length >= SHORTEST
        )

    def _from_disk(self, store: PrefixStore, index: int, wanted: NDArray[np.int32]) -> None:
        """Fill the slot from disk where that saves more than it holds."""
        slot = self._slots[index]
        match = store.best(wanted)
        if match is None or match[0] < slot.length + SHORTEST:
            return
        shared, entry = match
        size, free = len(entry.tokens), self.free_cells()
        fits = size <= len(slot.tokens) and (free is None or size <= free + slot.length)
        if not fits or (cells := store.read(entry)) is None:
            return
        self.truncate(index, 0)
        self._fill(index, entry.tokens, cells, shared)

    def _in_ram(self, wanted: NDArray[np.int32], shared: int) -> tuple[int, Kept] | None:
        """What is kept in RAM of `wanted`, where that saves enough beyond the `shared` tokens of a slot."""
        match = self.ram.best(wanted)
        if match is None:
            return None
        size, available = len(match[1].tokens), self.available_cells()
        saved = match[0] - shared
        worth = saved >= max(_SHORTEST_IN_RAM, size // _COPIED_FOR_ONE)
        return match if worth and (available is None or size <= available) else None

    def _from_ram(self, index: int, shared: int, kept: Kept) -> None:
        """Fill an empty slot with the first `shared` tokens of what is kept."""
        while (free := self.free_cells()) is not None and free < len(kept.tokens):
            if not self.evict_idle():
                return
        if self._fill(index, kept.tokens, kept.cells, shared):
            self.ram.use(kept, shared)

    def _fill(self, index: int, tokens: NDArray[np.int32], cells: Cells, shared: int) -> bool:
        """Give an empty slot saved cells, then cut them to `shared` tokens. False where they do not fit."""
        if not self._backend.restore(index, cells, len(tokens)):
            return False
        self.extend(index, tokens.tolist())
        self.truncate(index, shared)
        return True

    def keep_long(self) -> bool:
        """Copy to RAM what a slot of many tokens holds, where there is room: for while no request waits.

        False where nothing was copied.
        """
        for index, slot in enumerate(self._slots):
            tokens = slot.tokens[: slot.length]
            if slot.length >= _LONG and self.ram.fits(slot.length) and not self.ram.covers(tokens):
                self.ram.save(tokens, self._backend.save(index))
                return self.ram.covers(tokens)
        return False

    def _to_ram(self, index: int) -> None:
        """Keep a copy of what a slot holds, which is about to go."""
        slot = self._slots[index]
        tokens = slot.tokens[: slot.length]
        short = slot.length < _SHORTEST_IN_RAM
        if not self.ram.limit or short or self.ram.covers(tokens) or not self.ram.make_room(slot.length):
            return
        self.ram.save(tokens, self._backend.save(index))

    def extend(self, index: int, tokens: Sequence[int]) -> None:
        """Tell that the backend has computed `tokens` at the end of the slot."""
        slot = self._slots[index]
        end = slot.length + len(tokens)
        slot.tokens[slot.length : end] = tokens
        if self._shared:
            left = len(self._free) - len(tokens)
            cells = self._free[left:]
            del self._free[left:]
            slot.cells[slot.length : end] = cells
            self._holders[cells] = 1
        slot.length = end

    def truncate(self, index: int, n: int) -> None:
        """Keep the first `n` tokens of a slot."""
        slot = self._slots[index]
        if n < slot.length:
            self._backend.truncate(index, n)
            self._drop(slot, n)

    def restore(self, index: int) -> None:
        """Bring the backend's slot back to the length recorded here, after an interrupted step."""
        self._backend.truncate(index, self._slots[index].length)

    def release(self, index: int, *, keep: bool = True) -> None:
        """Give a slot back; with `keep` its tokens stay for whoever shares their beginning."""
        slot = self._slots[index]
        slot.busy = False
        slot.used = next(self._clock)
        if not keep:
            self.truncate(index, 0)

    def evict_idle(self) -> bool:
        """Empty the idle slot that was used least recently. False if no idle slot holds anything."""
        idle = [(slot.used, i) for i, slot in enumerate(self._slots) if not slot.busy and slot.length]
        if idle:
            index = min(idle)[1]
            self._to_ram(index)
            self.truncate(index, 0)
        return bool(idle)

    def _copy(self, src: int, dst: int, n: int) -> None:
        self._backend.copy(src, dst, n)
        source, target = self._slots[src], self._slots[dst]
        self._drop(target, 0)
        target.tokens[:n] = source.tokens[:n]
        if self._shared:
            cells = source.cells[:n]
            target.cells[:n] = cells
            self._holders[cells] += 1
        target.length = n

    def _drop(self, slot: Slot, n: int) -> None:
        if self._shared:
            gone = slot.cells[n : slot.length]
            self._holders[gone] -= 1
            self._free += gone[self._holders[gone] == 0].tolist()
        slot.length = n
