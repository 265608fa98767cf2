"""What is done to an answer besides sampling it: a thought has a budget, a constraint begins later.

A schema asked of a reasoning model is one for the answer, not for the thought before it. So the constraint
waits until a mark has appeared in the text (the thought's end, or the beginning of a tool call), and only
then rules the tokens. A thought that has used up its budget is closed by force.
"""

from __future__ import annotations

import codecs

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.backends.base import Backend
from edge.engine.grammar import Matcher
from edge.errors import RequestError
from edge.reasoning import THINK_END, ReasoningCounter

_CLOSING = f"\n{THINK_END}\n\n"


class ReasoningOptions(msgspec.Struct, frozen=True):
    """inside: the prompt has opened a thought. budget: tokens that a thought may have (None: no bound).

    after: the text after which the request's constraint begins ("": at once). With neither of the two the
    thought is counted, and nothing is done to the answer.
    """

    inside: bool = False
    budget: int | None = None
    constraint_after: str = ""


class ThinkingBudget:
    """Follows one answer token by token. `mask` says what the next token may be, None: anything."""

    def __init__(
        self,
        asked: ReasoningOptions,
        meter: ReasoningCounter,
        backend: Backend,
        stop_ids: frozenset[int],
        matcher: Matcher | None,
    ) -> None:
        self._after = asked.constraint_after if matcher is not None else ""
        self._budget = asked.budget
        self._waiting = matcher
        self._backend = backend
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._text = ""
        self._meter = meter
        self._forced: list[int] = []
        if asked.inside and asked.budget == 0:
            self._close()
        self._no_stop: NDArray[np.bool_] | None = None
        if matcher is not None and asked.constraint_after == THINK_END:
            # The answer would be missing if the model ended in its thought.
            self._no_stop = np.ones(backend.info.vocab, bool)
            self._no_stop[list(stop_ids)] = False

    def mask(self) -> NDArray[np.bool_] | None:
        if self._forced:
            only = np.zeros(self._backend.info.vocab, bool)
            only[self._forced[0]] = True
            return only
        return self._no_stop if self._waiting is not None else None

    def take(self, token: int, piece: bytes) -> Matcher | None:
        """Book a token, which the meter has already. The matcher, at the moment when it takes over.

        Raises RequestError where the token that completed the mark went on with what the constraint forbids.
        """
        if self._forced:
            assert token == self._forced[0]
            del self._forced[0]
        budget, used = self._budget, self._meter.tokens
        if budget is not None and used >= budget and self._meter.thinking and not self._forced:
            self._close()
        if self._waiting is None:
            return None
        self._text += self._decode(piece)
        taken = None
        if (at := self._text.find(self._after)) >= 0:
            taken, self._waiting = self._waiting, None
            self._forced = []
            self._begin(taken, self._text[at + len(self._after) :])
        self._text = self._text[-len(self._after) :]
        return taken

    def _close(self) -> None:
        self._budget = None
        self._forced = self._backend.encode(_CLOSING, special=True)

    def _begin(self, matcher: Matcher, rest: str) -> None:
        if not rest.strip():
            return
        for token in self._backend.encode(rest, special=False):
            if not matcher.allows(token):
                raise RequestError(
                    f"the model went on with {rest!r}, which the constraint does not allow",
                    status=500,
                    code="grammar_error",
                    param="response_format",
                )
            matcher.accept(token)
