"""Speculation by prompt lookup: what followed the same words before is likely to follow again.

A draft is taken from the request's own context (Saxena 2023, prompt lookup decoding), and verified by the
model in the same step. It can only save steps, never change greedy text; sampled text keeps its
distribution, since a drafted token is accepted exactly when the sampler would have drawn it.

How much is drafted follows from what it costs here and what it brings: a draft of n tokens, each right with
chance p as long as those before it were, makes 1 + p + ... + p^n tokens in a step that is longer by a factor
that was measured (Leviathan et al. 2023, section 3.3, with the cost of each width in place of a constant).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_NGRAM = 3
# A match of so many tokens is of another kind than one of three.
_LONG = 6
# With the token before it a draft fills sixteen rows, as wide as a tile of the matrix units.
_WIDEST = 15
# A draft must promise so much more than the step without it.
_WORTH = 1.05
# What is known fades with each draft, and drifts back to the guess with each chance that was let go.
_FADE, _DRIFT = 0.85, 0.02


@dataclass(slots=True)
class _Chance:
    """How likely a drafted token is right: `right` of `tried`, at first a guess that counts as two."""

    guess: float
    right: float = 0.0
    tried: float = 2.0

    def __post_init__(self) -> None:
        self.right = 2.0 * self.guess

    @property
    def value(self) -> float:
        return self.right / self.tried

    def learn(self, drafted: int, accepted: int) -> None:
        # What stands behind the first wrong token was not tried.
        self.right = _FADE * self.right + accepted
        self.tried = _FADE * self.tried + min(accepted + 1, drafted)

    def drift(self) -> None:
        self.right += _DRIFT * self.guess
        self.tried += _DRIFT


class Lookup:
    """Finds drafts for one sequence. `extend` is told each token once; `draft` proposes what may follow."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}
        self._short, self._long = _Chance(0.5), _Chance(0.8)
        self._kind = self._short
        for token in tokens:
            self.extend(token)

    def extend(self, token: int) -> None:
        tokens = self._tokens
        # The n-gram that ends before `token` is followed by it: remembered at its newest place.
        if len(tokens) >= _NGRAM:
            self._last[tuple(tokens[-_NGRAM:])] = len(tokens)
        tokens.append(token)

    def draft(self, most: int, streams: int, longer: Callable[[int], float]) -> list[int]:
        """Up to `most` tokens that followed the newest n-gram the last time; [] where it does not pay.

        streams: tokens that the step makes without a draft. longer: how many times as long the step takes
        with so many rows more.
        """
        tokens = self._tokens
        at = self._last.get(tuple(tokens[-_NGRAM:])) if len(tokens) >= _NGRAM else None
        if at is None:
            return []
        same = _NGRAM
        while same < _LONG and same < at and tokens[at - 1 - same] == tokens[-1 - same]:
            same += 1
        self._kind = self._long if same == _LONG else self._short
        n = self._width(min(most, _WIDEST), streams, longer)
        if not n:
            self._kind.drift()
            return []
        found = tokens[at : at + n]
        # A loop of a short period is continued past the end of what has been said.
        period = len(tokens) - at
        while len(found) < n:
            found.append(found[len(found) - period])
        return found

    def _width(self, most: int, streams: int, longer: Callable[[int], float]) -> int:
        """How many drafted tokens make the most text a second; 0 for none."""
        best, width = _WORTH, 0
        more, power = 0.0, 1.0
        for n in range(1, most + 1):
            power *= self._kind.value
            more += power
            gain = (1 + more / streams) / longer(n)
            if gain > best:
                best, width = gain, n
        return width

    def learn(self, drafted: int, accepted: int) -> None:
        """Of the last draft so many tokens were right."""
        self._kind.learn(drafted, accepted)
