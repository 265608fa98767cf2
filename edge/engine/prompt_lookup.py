"""Speculation by prompt lookup: what followed the same n-gram before is likely to follow again.

A draft is taken from the request's own context (Saxena 2023, prompt lookup decoding) and verified by the
model in the same step. It can only save steps, never change greedy text. Sampled text keeps its distribution,
since a drafted token is accepted exactly when the sampler draws it.

A draft is as long as pays. With n tokens, each right with probability p if those before it were, a step makes
1 + p + ... + p^n tokens and takes longer by a factor that was measured (Leviathan et al. 2023, section 3.3,
with the cost of each width in place of a constant).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_NGRAM = 3
# Matches of this many tokens and shorter ones have acceptance rates of their own.
_LONG = 6
# With the token before it such a draft fills sixteen rows, the width of a matrix unit's tile.
_WIDEST = 15
# A draft must be expected to speed up the step by this factor.
_WORTH = 1.05
# What was learnt fades with each draft, and drifts back to the guess with each draft that was not made.
_FADE, _DRIFT = 0.85, 0.02


@dataclass(slots=True)
class AcceptanceRate:
    """How likely a drafted token is right: `right` of `tried`; at first a guess that counts as two tokens."""

    guess: float
    right: float = 0.0
    tried: float = 2.0

    def __post_init__(self) -> None:
        self.right = 2.0 * self.guess

    @property
    def value(self) -> float:
        return self.right / self.tried

    def learn(self, drafted: int, accepted: int) -> None:
        # Tokens after the first wrong one were not tried.
        self.right = _FADE * self.right + accepted
        self.tried = _FADE * self.tried + min(accepted + 1, drafted)

    def drift(self) -> None:
        self.right += _DRIFT * self.guess
        self.tried += _DRIFT


class Lookup:
    """Finds drafts for one sequence. `extend` is called once for each token; `draft` proposes what may
    follow.

    short, long: acceptance rates after a match of three tokens, and after a longer one.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}
        self.short, self.long = AcceptanceRate(0.5), AcceptanceRate(0.8)
        self._rate = self.short
        for token in tokens:
            self.extend(token)

    def extend(self, token: int) -> None:
        tokens = self._tokens
        # `token` follows the n-gram that ends before it; the newest place counts.
        if len(tokens) >= _NGRAM:
            self._last[tuple(tokens[-_NGRAM:])] = len(tokens)
        tokens.append(token)

    def draft(self, most: int, streams: int, longer: Callable[[int], float]) -> list[int]:
        """Up to `most` tokens that followed the newest n-gram the last time; [] where it does not pay.

        streams: tokens that the step makes without a draft. longer(n): how many times as long the step takes
        with n more rows.
        """
        tokens = self._tokens
        # The place after the newest n-gram's last occurrence; a shorter context has none.
        place = self._last.get(tuple(tokens[-_NGRAM:]))
        if place is None:
            return []
        same = _NGRAM
        while same < min(_LONG, place) and tokens[place - 1 - same] == tokens[-1 - same]:
            same += 1
        self._rate = self.long if same == _LONG else self.short
        n = self._width(min(most, _WIDEST), streams, longer)
        if not n:
            self._rate.drift()
            return []
        # Text that repeats with a short period is continued past its end.
        period = len(tokens) - place
        return [tokens[place + i % period] for i in range(n)]

    def _width(self, most: int, streams: int, longer: Callable[[int], float]) -> int:
        """How many drafted tokens make the most text a second; 0 for none."""
        best, width = _WORTH, 0
        more, power = 0.0, 1.0
        for n in range(1, most + 1):
            power *= self._rate.value
            more += power
            gain = (1 + more / streams) / longer(n)
            if gain > best:
                best, width = gain, n
        return width

    def learn(self, drafted: int, accepted: int) -> None:
        """The first `accepted` of the last draft's `drafted` tokens were right."""
        self._rate.learn(drafted, accepted)
