"""Prefixes kept in RAM: what had to leave its slot need not be computed again when it is asked for once more.

The level between the slots and the files of prefix_store. It holds copies of KV cells, at most `limit` bytes,
and drops what was used least recently. In the order of their tokens, the one that shares the longest
beginning with a prompt is a neighbour of that prompt, so that a search takes log(n) comparisons.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.backends.base import Cells
from edge.engine.prefix_store import common


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """KV cells of `tokens`, as the backend saved them. order: the tokens as bytes that sort like them."""

    order: bytes
    tokens: NDArray[np.int32]
    cells: Cells


class PrefixRam:
    """At most `limit` bytes of KV cells; 0 keeps none. bytes: held now. hits, evictions: since the start."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._sorted: list[Kept] = []
        # The least recently used first.
        self._used: dict[Kept, None] = {}
        self._token_bytes = 0.0
        self.bytes = self.hits = self.evictions = 0

    def best(self, prompt: NDArray[np.int32]) -> tuple[int, Kept] | None:
        """How many tokens at the beginning of `prompt` are kept at most, and where; None if none are."""
        at = self._place(_order(prompt))
        near = [(common(kept.tokens, prompt), kept) for kept in self._sorted[max(0, at - 1) : at + 1]]
        best = max(near, key=lambda match: match[0], default=None)
        return best if best is not None and best[0] else None

    def covers(self, tokens: NDArray[np.int32]) -> bool:
        """Whether `tokens` are kept already, maybe with more behind them; they then count as used."""
        order = _order(tokens)
        at = self._place(order)
        found = at < len(self._sorted) and self._sorted[at].order.startswith(order)
        if found:
            self._touch(self._sorted[at])
        return found

    def save(self, tokens: NDArray[np.int32], cells: Cells) -> None:
        """Keep the cells of `tokens`, which are not covered, unless they alone are over the limit."""
        self._token_bytes = len(cells) / len(tokens)
        if not self.make_room(len(tokens)):
            return
        kept = Kept(_order(tokens), tokens.copy(), cells)
        at = self._place(kept.order)
        # Beginnings of it say nothing more.
        while at and kept.order.startswith(self._sorted[at - 1].order):
            at -= 1
            self._remove(self._sorted[at])
        self._sorted.insert(at, kept)
        self._touch(kept)
        self.bytes += len(cells)

    def fits(self, tokens: int) -> bool:
        """Whether `tokens` more have room beside what is kept; True where that is not known yet."""
        return self.bytes + tokens * self._token_bytes <= self.limit

    def make_room(self, tokens: int) -> bool:
        """Drop what `tokens` more have no room beside, so that copying them stays within the limit.

        False where they alone are over it, as far as is known before the first copy.
        """
        if tokens * self._token_bytes > self.limit:
            return False
        while not self.fits(tokens):
            self._remove(next(iter(self._used)))
            self.evictions += 1
        return True

    def use(self, kept: Kept, shared: int) -> None:
        """Tell that a slot now holds its first `shared` tokens. What a slot holds whole is not kept twice."""
        self.hits += 1
        if kept in self._used:
            if shared == len(kept.tokens):
                self._remove(kept)
            else:
                self._touch(kept)

    def _touch(self, kept: Kept) -> None:
        self._used.pop(kept, None)
        self._used[kept] = None

    def _remove(self, kept: Kept) -> None:
        del self._used[kept]
        del self._sorted[self._place(kept.order)]
        self.bytes -= len(kept.cells)

    def _place(self, order: bytes) -> int:
        return bisect_left(self._sorted, order, key=lambda kept: kept.order)


def _order(tokens: NDArray[np.int32]) -> bytes:
    return tokens.astype(">i4").tobytes()
