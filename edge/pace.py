"""How much of a step may go to reading prompts, so that running streams never stall. Pure policy."""

from __future__ import annotations

# A step with prompt tokens takes at most this share longer than a step of the running streams alone.
PREFILL_SHARE = 0.7
# A prompt alone is read in chunks of this many seconds, so that newcomers wait no longer.
ALONE_S = 0.4
SMALLEST_CHUNK = 8


class Pace:
    """How much of a step prompts may take, learnt from the steps themselves (seconds, exponential means)."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._quiet: float | None = None
        self._alone: float | None = None
        self._mixed: float | None = None

    def chunk(self, decoding: int, prefilling: int) -> int:
        """Prompt tokens that the next step may hold beside `decoding` rows.

        prefilling: requests that wait for their first token. Where they are many more than the streams that
        run, holding them back would only leave later steps half empty.
        """
        if not decoding or self._quiet is None:
            return self._bounded(ALONE_S, self._alone)
        share = PREFILL_SHARE * max(1.0, (prefilling / decoding) ** 2)
        return self._bounded(min(share * self._quiet, ALONE_S), self._mixed or self._alone)

    def _bounded(self, seconds: float, per_token: float | None) -> int:
        if per_token is None:
            return min(64, self._batch)
        return max(SMALLEST_CHUNK, min(self._batch, int(seconds / per_token)))

    def learn(self, decoding: int, prefill: int, seconds: float) -> None:
        # A coarse clock may see no time pass at all.
        seconds = max(seconds, 1e-6)
        if decoding and not prefill:
            self._quiet = _mean(self._quiet, seconds)
        elif prefill and not decoding:
            self._alone = _mean(self._alone, seconds / prefill)
        elif decoding and self._quiet is not None:
            self._mixed = _mean(self._mixed, max(seconds - self._quiet, 1e-6) / prefill)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else 0.7 * old + 0.3 * new
