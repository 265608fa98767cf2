"""From the bytes of tokens to text, piece by piece: never half a character, never half a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of tokens into text that may be shown.

    An incomplete character is held back, and so is any tail that could begin a stop string. The joined
    results of `push` and `finish` equal the whole text, cut before the first stop string. stopped: the one
    that appeared.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped: str | None = None

    def push(self, data: bytes) -> str:
        """Text that is certain after `data`. Sets `stopped` when a stop string has appeared."""
        text = self._decoder.decode(data)
        return self._scan(text) if self._stops else text

    def finish(self) -> str:
        """What is still held, at the end of an answer; an incomplete character becomes U+FFFD."""
        text = self._scan(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _scan(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        self._held += text
        matches = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if matches:
            cut, self.stopped = min(matches)
        else:
            cut = len(self._held) - max((overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[:cut], "" if matches else self._held[cut:]
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
