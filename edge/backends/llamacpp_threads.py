"""Fewer threads while others use the cores.

llama.cpp's threads meet at a barrier after each operation and spin there. When another program takes one of
their cores, all of them wait for it, hundreds of times a token: two threads can then be several times slower
than one. The governor notices steps that take far longer than they did, tries fewer threads, keeps what is
faster, and goes back to all of them when that pays again. Pure policy: it is told durations.
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


class Governor:
    """Chooses the number of threads from how long steps take. most: what a quiet machine runs best with."""

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
        """A decoding step of `rows` took `seconds`; `threads` may be another number afterwards."""
        if len(self._levels) == 1:
            return
        usual = self._usual.get(rows)
        if usual is None:
            # The first steps of a size are taken as they come; only full threads tell what is usual.
            if self._level == 0:
                self._usual[rows] = seconds
            return
        if self._level == 0:
            # It sinks at once and rises slowly: a longer context makes steps longer, too.
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
        """End a trial: keep the new level if it is faster, after a look at those below if it is disturbed."""
        assert self._before is not None
        level, was = self._before
        self._recent.clear()
        if self._level > level and slowness > DISTURBED and self._level + 1 < len(self._levels):
            # One core less may not be enough; what is best of all so far is gone back to.
            if slowness < was:
                self._before = (self._level, slowness)
            self._level += 1
            return
        self._before = None
        self._next_trial = now + RETRY_S
        if slowness >= was:
            self._level = level
