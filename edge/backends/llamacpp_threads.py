"""Uses fewer threads while other programs use the cores.

llama.cpp's threads meet at a barrier after each operation and spin there. When another program takes one of
their cores, all of them wait for it, hundreds of times a token: two threads can then be several times slower
than one. The controller notices steps that take far longer than they did, tries fewer threads, keeps what is
faster, and returns to all threads when that pays again. It only sees durations and measures nothing itself.
"""

from __future__ import annotations

import statistics
from collections import deque

# A step that takes this many times its usual time, in the median, is being disturbed.
DISTURBED = 1.8
# Steps that decide; a trial is as long.
WINDOW = 6
# Seconds between trials of more threads, and of fewer after a trial that did not help.
RETRY_S = 5.0


class ThreadController:
    """Chooses the number of threads from how long steps take. most: the fastest on a quiet machine."""

    def __init__(self, most: int) -> None:
        self._levels = sorted({most, -(-3 * most // 4), -(-most // 2)}, reverse=True)
        self._level = 0
        # Usual seconds of a step at all threads, by how many rows it has.
        self._usual: dict[int, float] = {}
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._before: tuple[int, float] | None = None
        self._next_trial = 0.0

    @property
    def threads(self) -> int:
        return self._levels[self._level]

    def learn(self, rows: int, seconds: float, now: float) -> None:
        """A decode step of `rows` took `seconds`; may change `threads`. now: on a monotonic clock."""
        if len(self._levels) == 1:
            return
        usual = self._usual.get(rows)
        if usual is None:
            # The first step of a size sets what is usual, if all threads ran it.
            if self._level == 0:
                self._usual[rows] = seconds
            return
        if self._level == 0:
            # Falls at once and rises slowly: a longer context makes steps longer, too.
            self._usual[rows] = seconds if seconds < usual else usual * 0.98 + min(seconds, 2 * usual) * 0.02
        self._recent.append(seconds / usual)
        if len(self._recent) < WINDOW:
            return
        slowness = statistics.median(self._recent)
        if self._before is not None:
            self._judge(slowness, now)
        elif self._level == 0:
            if slowness > DISTURBED and now >= self._next_trial:
                self._try(1, slowness)
        elif now >= self._next_trial:
            self._try(0, slowness)

    def _try(self, level: int, slowness: float) -> None:
        self._before = (self._level, slowness)
        self._level = level
        self._recent.clear()

    def _judge(self, slowness: float, now: float) -> None:
        """End a trial: keep the new level if it is faster. While disturbed, try the next lower one first."""
        assert self._before is not None
        level, was = self._before
        self._recent.clear()
        if self._level > level and slowness > DISTURBED and self._level + 1 < len(self._levels):
            # One thread less may not be enough. `_before` keeps the best level so far, to return to.
            if slowness < was:
                self._before = (self._level, slowness)
            self._level += 1
            return
        self._before = None
        self._next_trial = now + RETRY_S
        if slowness >= was:
            self._level = level
