"""How much of a step may go to reading prompts, so that running streams never stall. Pure policy."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

# A step with prompt tokens takes at most this share longer than a step of the running streams alone, or
# this many seconds in all: text is shown every 40 ms at most, so that shorter steps are not felt.
PREFILL_SHARE = 0.7
UNFELT_S = 0.06
# So many times as many streams must run as prompts wait, for several prompts to be read politely.
MANY_MORE = 4
# A prompt alone is read in chunks of this many seconds, so that newcomers wait no longer; a burst of them,
# whose last one waits much longer anyway, in steps of this share of the burst, with a bound in seconds.
ALONE_S = 0.4
BURST_SHARE = 0.5
BURST_S = 1.5
SMALLEST_CHUNK = 4
# A polite chunk may add so many times what the smallest one does, while its step is not twice as long: a
# piece that takes a pass of its own costs nearly the same for two tokens and for a dozen.
NEARLY_FREE = 1.3
TWICE = 0.95
# What is left, after each polite step, of what longer chunks are known to take: they are tried again.
FADE = 0.99
# What a row more adds to a step where steps of one width alone were seen, as a share of it.
GUESSED_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Requests that have or could have a slot and wait for their first token.

    tokens: what is left to read of their prompts. first, last: keys of the oldest and the youngest.
    """

    count: int = 0
    tokens: int = 0
    first: int = 0
    last: int = 0


class StepTimes:
    """Seconds of a step without prompts by its rows (exponential means).

    fade: what is left, after each step of the narrowest kind, of what wider ones are known to take beyond it,
    until a wider one is seen: one that was long by chance is tried again, and tells of all of them.
    """

    def __init__(self, fade: float = 1.0) -> None:
        self._fade = fade
        self._left = 1.0
        self._seen: dict[int, float] = {}
        self._rows: list[int] = []

    def learn(self, rows: int, seconds: float) -> None:
        # A coarse clock may see no time pass at all.
        seconds = max(seconds, 1e-6)
        place = bisect.bisect_left(self._rows, rows)
        if rows not in self._seen:
            self._rows.insert(place, rows)
        self._seen[rows] = _mean(self._seen.get(rows), seconds)
        self._left = 1.0 if place else self._left * self._fade

    def _of(self, rows: int) -> float:
        least, seconds = self._seen[self._rows[0]], self._seen[rows]
        return least + (seconds - least) * self._left if seconds > least else seconds

    def at(self, rows: int) -> float | None:
        """Expected seconds, between what was seen; as those of the nearest beyond it; None at first."""
        if not self._rows:
            return None
        place = bisect.bisect_left(self._rows, rows)
        above = self._rows[min(place, len(self._rows) - 1)]
        below = self._rows[max(place - 1, 0)] if above > rows else above
        if below == above or below > rows:
            return self._of(above)
        part = (rows - below) / (above - below)
        return self._of(below) + part * (self._of(above) - self._of(below))

    def longer(self, rows: int, more: int) -> float:
        """How many times as long a step of `rows` takes with `more` of them; a guess beyond what was seen."""
        now, then = self.at(rows), self.at(rows + more)
        if now is None or then is None:
            return 1.0 + GUESSED_SHARE * more
        first, widest = self._rows[0], max(self._rows[-1], rows)
        if rows + more > widest:
            # Matrix units take rows by the tile: those that were not tried cost less than those that were.
            each = (
                (then - self._seen[first]) / (widest - first) / 2 if widest > first else GUESSED_SHARE * now
            )
            then += max(0.0, each) * (rows + more - widest)
        # A row more never makes a step shorter: that is noise.
        return max(1.0, then / now)


class AddedTimes:
    """Seconds that chunks of a prompt add to a step of running streams, by their size (exponential means).

    Sizes are 4, 6, 8, 12, 16 and so on. What the next longer chunk is known to add fades from step to step,
    so that it is tried again: by chance it may have been slow.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._left: dict[int, float] = {}

    def longest(self, seconds: float, bound: float, most: int) -> int:
        """The longest chunk that adds no more than `seconds`, or hardly more than the smallest and no more
        than `bound`; 0 at first. One longer than any that was seen is tried once.
        """
        if not self._seen:
            return 0
        chunk, free = SMALLEST_CHUNK, NEARLY_FREE * self._of(SMALLEST_CHUNK)
        seconds = max(seconds, min(free, bound))
        while (longer := _longer(chunk)) <= most:
            if longer > max(self._seen):
                return longer
            if self._of(longer) > seconds:
                break
            chunk = longer
            if self._left.get(chunk, 1.0) < 1.0:
                break
        return min(chunk, most)

    def _of(self, size: int) -> float:
        # Of a size that was left out: in proportion to the next longer one's.
        near = min(one for one in self._seen if one >= size)
        return self._seen[near] * self._left[near] * size / near

    def learn(self, tokens: int, seconds: float) -> None:
        if tokens < SMALLEST_CHUNK:
            return
        size = SMALLEST_CHUNK
        while (longer := _longer(size)) <= tokens:
            size = longer
        # One that is tried again says what it takes now, whatever it took by chance.
        known = self._seen.get(size) if self._left.get(size) == 1.0 else None
        # A step that others made long says little of the next one.
        self._seen[size] = seconds if known is None else _mean(known, min(seconds, 2 * known))
        self._left[size] = 1.0
        if above := [one for one in self._seen if one > size]:
            self._left[min(above)] *= FADE


class PrefillBudget:
    """How much of a step prompts may take, learnt from the steps themselves (seconds, exponential means)."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self.times = StepTimes()
        self._alone: float | None = None
        self._added = AddedTimes()
        # The youngest request of the last burst.
        self._burst = 0

    def chunk(self, decoding: int, new: Newcomers) -> int:
        """Prompt tokens that the next step may hold beside `decoding` rows; 0 where nobody waits.

        A single newcomer must not be felt by the streams that run. Where several wait, and running streams
        are not many more, the prompts go first, to the last one of this burst: holding some back would
        leave later steps half empty, as those that came together would not end together.
        """
        if not new.count:
            return 0
        if new.count > 1 and decoding <= MANY_MORE * new.count:
            self._burst = new.last
        if new.first <= self._burst:
            whole = new.tokens * (self._alone or 0.0)
            return self._bounded(max(ALONE_S, min(BURST_SHARE * whole, BURST_S)), self._alone)
        # Beyond what was seen a step is taken to be no longer: a guess that is polite to the streams.
        quiet = self.times.at(decoding) if decoding else None
        if quiet is None:
            return self._bounded(ALONE_S, self._alone)
        seconds = min(max(PREFILL_SHARE * quiet, UNFELT_S - quiet), ALONE_S)
        return self._added.longest(seconds, TWICE * quiet, self._batch) or self._bounded(seconds, self._alone)

    def _bounded(self, seconds: float, per_token: float | None) -> int:
        if per_token is None:
            return min(64, self._batch)
        return max(SMALLEST_CHUNK, min(self._batch, int(seconds / per_token)))

    def learn(self, decoding: int, prefill: int, seconds: float) -> None:
        """A step of `decoding` rows and `prefill` prompt tokens took `seconds`."""
        # A coarse clock may see no time pass at all.
        seconds = max(seconds, 1e-6)
        if decoding and not prefill:
            self.times.learn(decoding, seconds)
        elif prefill and not decoding:
            self._alone = _mean(self._alone, seconds / prefill)
        elif (quiet := self.times.at(decoding)) is not None:
            self._added.learn(prefill, max(seconds - quiet, 1e-6))


def _longer(chunk: int) -> int:
    """The next of the sizes that chunks have: 4, 6, 8, 12, 16, 24 and so on."""
    return chunk * 3 // 2 if chunk & (chunk - 1) == 0 else chunk // 3 * 4


def _mean(old: float | None, new: float) -> float:
    return new if old is None else 0.7 * old + 0.3 * new
