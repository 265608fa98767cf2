"""Speculation by prompt lookup: what followed the same words before is likely to follow again.

A draft is taken from the request's own context (Saxena 2023, prompt lookup decoding), and verified by the
model in the same step. It can only save steps, never change greedy text; sampled text keeps its
distribution, since a drafted token is accepted exactly when the sampler would have drawn it.
"""

from __future__ import annotations

_NGRAM = 3
_WIDEST = 16
# After a draft that failed entirely, so many tokens pass before the next try, doubled each time.
_REST = 4
_LONGEST_REST = 64


class Lookup:
    """Finds drafts for one sequence. `extend` is told each token once; `draft` proposes what may follow."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}
        self._width = 4
        self._rest = 0
        self._pause = _REST
        for token in tokens:
            self.extend(token)

    def extend(self, token: int) -> None:
        tokens = self._tokens
        # The n-gram that ends before `token` is followed by it: remembered at its newest place.
        if len(tokens) >= _NGRAM:
            self._last[tuple(tokens[-_NGRAM:])] = len(tokens)
        tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the newest n-gram the last time; [] where it does not pay."""
        if self._rest > 0:
            self._rest -= 1
            return []
        at = self._last.get(tuple(self._tokens[-_NGRAM:])) if len(self._tokens) >= _NGRAM else None
        if at is None:
            return []
        n = min(most, self._width)
        found = self._tokens[at : at + n]
        # A loop of a short period is continued past the end of what has been said.
        period = len(self._tokens) - at
        while len(found) < n:
            found.append(found[len(found) - period])
        return found

    def learn(self, drafted: int, accepted: int) -> None:
        """Adapt the width to what was accepted; a draft that failed entirely pauses speculation."""
        if accepted == drafted:
            self._width = min(self._width * 2, _WIDEST)
            self._pause = _REST
        elif accepted == 0:
            self._width = 2
            self._rest = self._pause
            self._pause = min(self._pause * 2, _LONGEST_REST)
        else:
            self._width = max(2, accepted + 1)
            self._pause = _REST
