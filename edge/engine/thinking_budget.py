"""What rules an answer besides its sampling: a budget for reasoning, and a constraint that begins later.

A schema asked of a reasoning model is meant for the answer, not for the reasoning before it. So the
constraint waits until a mark has appeared in the text (the end of reasoning, or the beginning of a tool
call), and rules the tokens from there on. Reasoning that has used up its budget is closed by force.
"""

from __future__ import annotations

import codecs

import msgspec
import numpy as np

from edge.backends.base import Backend
from edge.engine.grammar import Matcher
from edge.engine.sampling import Mask
from edge.errors import RequestError
from edge.reasoning import THINK_END, ReasoningCounter

_CLOSING = f"\n{THINK_END}\n\n"


class ReasoningOptions(msgspec.Struct, frozen=True):
    """How a reasoning model is to be treated. With the defaults its reasoning is counted, and nothing else
    done.

    inside: the prompt has opened the reasoning. budget: tokens that reasoning may have (None: no bound).
    constraint_after: the text after which the request's constraint begins ("": at once).
    """

    inside: bool = False
    budget: int | None = None
    constraint_after: str = ""


class ThinkingBudget:
    """Follows one answer token by token, and keeps its constraint until that begins."""

    def __init__(
        self,
        options: ReasoningOptions,
        counter: ReasoningCounter,
        backend: Backend,
        stop_ids: frozenset[int],
        matcher: Matcher | None,
    ) -> None:
        self._mark = options.constraint_after
        self._budget = options.budget
        self._waiting = matcher if self._mark else None
        self._backend = backend
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._text = ""
        self._counter = counter
        # Token ids that come next, whatever the model wants.
        self._forced: list[int] = []
        if options.inside and options.budget == 0:
            self._close()
        self._no_stop: Mask | None = None
        if self._waiting is not None and self._mark == THINK_END:
            # The answer would be missing if the model ended while it reasons.
            self._no_stop = np.ones(backend.info.vocab, bool)
            self._no_stop[list(stop_ids)] = False

    def mask(self) -> Mask | None:
        """True for each token that may come next, [vocab]; None: any."""
        if self._forced:
            only: Mask = np.arange(self._backend.info.vocab) == self._forced[0]
            return only
        return self._no_stop if self._waiting is not None else None

    def take(self, token: int, piece: bytes) -> Matcher | None:
        """Follow a token and its bytes, which `counter` has taken already. The constraint's matcher, at the
        moment it begins to rule.

        Raises RequestError where the text after the mark, in the token that completed it, breaks the
        constraint.
        """
        if self._forced:
            assert token == self._forced.pop(0)
        spent = self._budget is not None and self._counter.tokens >= self._budget
        if spent and self._counter.thinking and not self._forced:
            self._close()
        if self._waiting is None:
            return None
        self._text += self._decode(piece)
        before, mark, rest = self._text.partition(self._mark)
        self._text = before[-len(self._mark) :]
        if not mark:
            return None
        matcher, self._waiting, self._forced = self._waiting, None, []
        self._begin(matcher, rest)
        return matcher

    def _close(self) -> None:
        self._budget = None
        self._forced = self._backend.encode(_CLOSING, special=True)

    def _begin(self, matcher: Matcher, rest: str) -> None:
        for token in self._backend.encode(rest, special=False) if rest.strip() else []:
            if not matcher.allows(token):
                raise RequestError(
                    f"the model went on with {rest!r}, which the constraint does not allow",
                    status=500,
                    code="grammar_error",
                    param="response_format",
                )
            matcher.accept(token)
