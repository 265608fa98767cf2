"""Bytes to text as they come: never half a character, never half a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of tokens into text that may be shown.

    A character that is not complete is held back; so is any tail that could begin a stop string. The joined
    results of `push` and `finish` equal the decoded whole, cut before the first stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped: str | None = None

    def push(self, data: bytes) -> str:
        """Text that is certain after `data`. Sets `stopped` when a stop string has appeared."""
        text = self._decoder.decode(data)
        if not self._stops:
            return text
        return self._scan(text) if text else ""

    def finish(self) -> str:
        """What is still held, at the end of a turn or at its limit; a broken character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        shown = self._scan(self._decoder.decode(b"", final=True))
        if self.stopped is None:
            shown += self._held
            self._held = ""
        return shown

    def _scan(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found)
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
