"""How many prompt tokens a step may hold, so that running streams never stall. Pure policy."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

# A step with prompt tokens takes at most this share longer than a step of the running streams alone, or this
# many seconds in all: text is sent every 40 ms at most, so shorter steps are not felt.
PREFILL_SHARE = 0.7
UNFELT_S = 0.06
# Prefill in small chunks only if running streams exceed waiting prompts by this factor.
SMALL_CHUNKS_FROM = 4
# A single prompt is read in chunks of this many seconds, so that newcomers wait no longer. A burst of
# prompts, whose last one waits much longer anyway, takes steps of this share of its time, up to this many
# seconds.
ALONE_S = 0.4
BURST_SHARE = 0.5
BURST_S = 1.5
SMALLEST_CHUNK = 4
# A small chunk may add this many times what the smallest one adds, while its step is less than twice as long:
# a chunk that needs a pass of its own costs nearly the same for two tokens and for a dozen.
NEARLY_FREE = 1.3
TWICE = 0.95
# After each chunk, what the next larger size is known to add shrinks to this share, until it is tried again.
FADE = 0.99
# An untried chunk has at most this many times the tokens of the largest that was tried: a GPU reads thousands
# in the time of a few, and a prompt would be over before small steps led there.
GROWTH = 8
# What one row adds to a step, as a share of it, where only steps of one width were seen.
GUESSED_SHARE = 0.15
# The sizes of small chunks: 4, 6, 8, 12, 16, 24 and so on.
SIZES = [size << doublings for doublings in range(24) for size in (SMALLEST_CHUNK, SMALLEST_CHUNK * 3 // 2)]


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Requests that wait for their first token and have, or could have, a slot.

    tokens: what is left to read of their prompts. first, last: keys of the oldest and the youngest.
    """

    count: int = 0
    tokens: int = 0
    first: int = 0
    last: int = 0


class StepTimes:
    """Seconds of a step without prompts, by its rows (exponential means).

    fade: after each step of the smallest width, the extra time of wider ones shrinks to this share, until a
    wider one is seen again. A width that was slow by chance is thus tried again, and its time tells of all
    widths.
    """

    def __init__(self, fade: float = 1.0) -> None:
        self._fade = fade
        self._left = 1.0
        self._seen: dict[int, float] = {}
        self._rows: list[int] = []

    def learn(self, rows: int, seconds: float) -> None:
        place = bisect.bisect_left(self._rows, rows)
        if rows not in self._seen:
            self._rows.insert(place, rows)
        self._seen[rows] = _mean(self._seen.get(rows), seconds)
        self._left = 1.0 if place else self._left * self._fade

    def _of(self, rows: int) -> float:
        least, seconds = self._seen[self._rows[0]], self._seen[rows]
        return least + (seconds - least) * self._left if seconds > least else seconds

    def at(self, rows: int) -> float | None:
        """Expected seconds: interpolated, the nearest width's outside of what was seen; None before the
        first."""
        if not self._rows:
            return None
        place = bisect.bisect_left(self._rows, rows)
        above = self._rows[min(place, len(self._rows) - 1)]
        if place == 0 or above <= rows:
            return self._of(above)
        below = self._rows[place - 1]
        share = (rows - below) / (above - below)
        return self._of(below) + share * (self._of(above) - self._of(below))

    def longer(self, rows: int, more: int) -> float:
        """How many times as long a step of `rows` takes with `more` rows added; a guess beyond what was
        seen."""
        now, then = self.at(rows), self.at(rows + more)
        if now is None or then is None:
            return 1.0 + GUESSED_SHARE * more
        first, widest = self._rows[0], max(self._rows[-1], rows)
        if rows + more > widest:
            # Matrix units take rows by the tile: untried rows cost less than tried ones.
            seen = (
                (then - self._seen[first]) / (widest - first) / 2 if widest > first else GUESSED_SHARE * now
            )
            then += max(0.0, seen) * (rows + more - widest)
        # Another row never makes a step shorter: that is noise.
        return max(1.0, then / now)


class AddedTimes:
    """Seconds that a chunk of a prompt adds to a step of running streams, by its size (exponential means).

    What the next larger chunk is known to add fades from step to step, so that it is tried again: it may have
    been slow by chance.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._left: dict[int, float] = {}

    def longest(self, seconds: float, bound: float, most: int) -> int:
        """The largest chunk, up to `most`, that adds no more than `seconds`, or no more than `bound` and
        hardly more than the smallest one; 0 at first. A size larger than any that was seen is tried once: its
        tokens are taken to cost no more each than those of the largest that was.
        """
        if not self._seen:
            return 0
        chunk = SMALLEST_CHUNK
        seconds = max(seconds, min(NEARLY_FREE * self._of(chunk), bound))
        for larger in SIZES[1 : bisect.bisect_right(SIZES, most)]:
            if larger > (largest := max(self._seen)):
                allowed = min(most, GROWTH * largest, int(largest * seconds / self._seen[largest]))
                # Fewer may be allowed than the smallest size: it is not to be counted from the end.
                return max(larger, SIZES[max(bisect.bisect_right(SIZES, allowed) - 1, 0)])
            if self._of(larger) > seconds:
                break
            chunk = larger
            if self._left.get(chunk, 1.0) < 1.0:
                break
        return min(chunk, most)

    def _of(self, size: int) -> float:
        # A size that was never used: in proportion to the next larger one.
        nearest = min(seen for seen in self._seen if seen >= size)
        return self._seen[nearest] * self._left[nearest] * size / nearest

    def learn(self, tokens: int, seconds: float) -> None:
        if tokens < SMALLEST_CHUNK:
            return
        size = SIZES[bisect.bisect_right(SIZES, tokens) - 1]
        # A size that was tried again counts as it is now, whatever it took before.
        before = self._seen.get(size) if self._left.get(size) == 1.0 else None
        # A step that other processes slowed down says little of the next one.
        self._seen[size] = seconds if before is None else _mean(before, min(seconds, 2 * before))
        self._left[size] = 1.0
        if larger := [seen for seen in self._seen if seen > size]:
            self._left[min(larger)] *= FADE


class PrefillBudget:
    """How much of a step prompts may take, learnt from the steps themselves (seconds, exponential means)."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self.times = StepTimes()
        self._per_token: float | None = None
        self._added = AddedTimes()
        # The youngest request of the last burst.
        self._burst = 0

    def chunk(self, decoding: int, new: Newcomers) -> int:
        """Prompt tokens that the next step may hold beside `decoding` rows; 0 where nobody waits.

        A single newcomer must not be felt by the streams that run. Where several wait, and running streams
        are not many more, the prompts go first, to the last one of this burst: requests that came together
        then end together, and later steps are not half empty.
        """
        if not new.count:
            return 0
        if new.count > 1 and decoding <= SMALL_CHUNKS_FROM * new.count:
            self._burst = new.last
        if new.first <= self._burst:
            whole = new.tokens * (self._per_token or 0.0)
            return self._tokens(max(ALONE_S, min(BURST_SHARE * whole, BURST_S)))
        # A width that was not seen is taken to be no slower than the nearest: running streams come first.
        quiet = self.times.at(decoding) if decoding else None
        if quiet is None:
            return self._tokens(ALONE_S)
        seconds = min(max(PREFILL_SHARE * quiet, UNFELT_S - quiet), ALONE_S)
        return self._added.longest(seconds, TWICE * quiet, self._batch) or self._tokens(seconds)

    def _tokens(self, seconds: float) -> int:
        """How many prompt tokens are read in `seconds` while nothing else runs, within the bounds of a
        step."""
        if self._per_token is None:
            return min(64, self._batch)
        return max(SMALLEST_CHUNK, min(self._batch, int(seconds / self._per_token)))

    def learn(self, decoding: int, prefill: int, seconds: float) -> None:
        """A step of `decoding` rows and `prefill` prompt tokens took `seconds`."""
        if decoding and not prefill:
            self.times.learn(decoding, seconds)
        elif prefill and not decoding:
            self._per_token = _mean(self._per_token, seconds / prefill)
        elif (quiet := self.times.at(decoding)) is not None:
            self._added.learn(prefill, max(seconds - quiet, 1e-6))


def _mean(old: float | None, new: float) -> float:
    # A coarse clock may see no time pass at all.
    new = max(new, 1e-6)
    return new if old is None else 0.7 * old + 0.3 * new
