"""How much of a step may go to reading prompts, so that running streams never stall. Pure policy."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Newcomers:
    """Requests that have or could have a slot and wait for their first token.

    tokens: what is left to read of their prompts. first, last: keys of the oldest and the youngest.
    """

    count: int = 0
    tokens: int = 0
    first: int = 0
    last: int = 0


class Pace:
    """How much of a step prompts may take, learnt from the steps themselves (seconds, exponential means)."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        # Seconds of a step without prompts, by its number of decoding rows.
        self._quiet: dict[int, float] = {}
        self._alone: float | None = None
        self._mixed: float | None = None
        # The youngest request of the last burst.
        self._burst = 0

    def chunk(self, decoding: int, new: Newcomers) -> int:
        """Prompt tokens that the next step may hold beside `decoding` rows.

        A single newcomer must not be felt by the streams that run. Where several wait, and running streams
        are not many more, the prompts go first, to the last one of this burst: holding some back would
        leave later steps half empty, as those that came together would not end together.
        """
        if new.count > 1 and decoding <= MANY_MORE * new.count:
            self._burst = new.last
        if new.count and new.first <= self._burst:
            whole = new.tokens * (self._alone or 0.0)
            return self._bounded(max(ALONE_S, min(BURST_SHARE * whole, BURST_S)), self._alone)
        quiet = self.quiet(decoding) if decoding else None
        if quiet is None:
            return self._bounded(ALONE_S, self._alone)
        seconds = max(PREFILL_SHARE * quiet, UNFELT_S - quiet)
        return self._bounded(min(seconds, ALONE_S), self._mixed or self._alone)

    def quiet(self, rows: int) -> float | None:
        """Expected seconds of a step of `rows` decoding rows alone, between or beyond what was seen."""
        seen = sorted(self._quiet)
        if not seen:
            return None
        below = max((n for n in seen if n <= rows), default=None)
        above = min((n for n in seen if n >= rows), default=None)
        if below is None or above is None or below == above:
            # Beyond what was seen a step is taken to be no longer: a guess that is polite to the streams.
            return self._quiet[seen[0] if below is None else below]
        part = (rows - below) / (above - below)
        return self._quiet[below] + part * (self._quiet[above] - self._quiet[below])

    def _bounded(self, seconds: float, per_token: float | None) -> int:
        if per_token is None:
            return min(64, self._batch)
        return max(SMALLEST_CHUNK, min(self._batch, int(seconds / per_token)))

    def learn(self, decoding: int, prefill: int, seconds: float) -> None:
        """A step of `decoding` rows and `prefill` prompt tokens took `seconds`."""
        # A coarse clock may see no time pass at all.
        seconds = max(seconds, 1e-6)
        if decoding and not prefill:
            self._quiet[decoding] = _mean(self._quiet.get(decoding), seconds)
        elif prefill and not decoding:
            self._alone = _mean(self._alone, seconds / prefill)
        elif (quiet := self.quiet(decoding)) is not None:
            self._mixed = _mean(self._mixed, max(seconds - quiet, 1e-6) / prefill)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else 0.7 * old + 0.3 * new
