"""Texts to token ids in bounded time, on a thread of its own.

A text is refused unread where its bytes alone show that it has too many tokens. llama.cpp needs time in the
square of a text's special tokens, so a text with many of them is tokenized in blocks that each begin at one.
"""

from __future__ import annotations

import functools
import itertools
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from edge.backends.base import Backend, BackendInfo, nothing
from edge.engine.deep_stack import deep_stack
from edge.errors import RequestError
from edge.prompt import Prompt, any_of, token_ids

# Special tokens of a block.
BLOCK = 64
# The tokens of a text up to this length are always counted, so that a user learns how many are too many.
COUNTED_BYTES = 2**15
# Requests wait in the order of their size in these, then of their arrival: a short text never waits for all
# of the long ones.
_LANE_BYTES = 2**16


def blocks(text: str, marks: tuple[str, ...]) -> Iterator[str]:
    """`text` in parts, each but the first of which begins with one of `marks` and holds about BLOCK of them.

    Tokenized by themselves the parts give the ids of the whole: no cut is made where another mark overlaps
    the one that would be cut at.
    """
    start = count = 0
    for match in _pattern(marks).finditer(text) if marks else ():
        if count >= BLOCK:
            count = 0
            if not _overlapped(text, match, marks):
                yield text[start : match.start()]
                start = match.start()
        count += 1
    yield text[start:]


def _overlapped(text: str, mark: re.Match[str], marks: tuple[str, ...]) -> bool:
    """Whether another of `marks` begins before `mark` and ends in it, or begins in it and ends after it."""
    pattern, (begin, end) = _pattern(marks), mark.span()
    for place in range(max(0, begin - _longest(marks) + 1), end):
        other = pattern.match(text, place) if place != begin else None
        if other is not None and other.end() > (begin if place < begin else end):
            return True
    return False


@functools.lru_cache(maxsize=16)
def _longest(marks: tuple[str, ...]) -> int:
    return max(map(len, marks))


@functools.lru_cache(maxsize=16)
def _pattern(marks: tuple[str, ...]) -> re.Pattern[str]:
    """Matches the longest of `marks`. Its time does not grow with their number."""
    return re.compile(any_of(marks))


def encode(
    backend: Backend,
    text: str | Prompt,
    *,
    special: bool,
    limit: int | None = None,
    check: Callable[[], None] = nothing,
) -> list[int]:
    """The ids of `text`. check: called before each block; raises to end the work.

    Raises RequestError for a text over COUNTED_BYTES with `limit` tokens or more, as soon as that is sure.
    """
    info = backend.info
    plain = text.text if isinstance(text, Prompt) else text
    size = len(plain.encode("utf-8"))
    counted = limit is None or size <= COUNTED_BYTES
    if limit is not None and not counted and info.token_bytes:
        # Spaces beside some special tokens are swallowed.
        size = len("".join(plain.split()).encode("utf-8")) if info.strips else size
        if (least := -(-size // info.token_bytes)) >= limit:
            raise too_long(info, f"at least {least}")
    done = 0

    def part_ids(part: str) -> list[int]:
        nonlocal done
        tokens: list[int] = []
        for block in blocks(part, backend.marks(special=special)):
            check()
            if limit is not None and not counted and done >= limit:
                raise too_long(info, f"at least {done}")
            ids = backend.encode(block, special=special)
            done += len(ids)
            tokens += ids
        return tokens

    return token_ids([text], lambda parts: list(map(part_ids, parts)))[0]


def too_long(info: BackendInfo, count: str) -> RequestError:
    """The refusal of a prompt of `count` tokens."""
    return RequestError(
        f"the prompt has {count} tokens; this server's context holds {info.context}, "
        "one of them for the answer",
        code="context_length_exceeded",
        param="messages",
        hint="shorten the prompt, or serve with a larger --ctx",
    )


class Keyed(Protocol):
    """A request; `key` is its own."""

    key: int


K = TypeVar("K", bound=Keyed)


class TokenizerThread(Generic[K]):
    """Hands requests to `handle`, one after another, on a thread of its own.

    handle(request, arrived, check): arrived: on time.monotonic(). check: raises the RequestError that has
    ended the request meanwhile. refuse(key, error): answers a request that is ended before its turn.
    ended(key): called after `handle` where the request was ended in between; `handle` may not have noticed.
    """

    def __init__(
        self,
        handle: Callable[[K, float, Callable[[], None]], None],
        refuse: Callable[[int, RequestError], None],
        ended: Callable[[int], None],
    ) -> None:
        self._handle, self._refuse, self._ended = handle, refuse, ended
        self._queue: queue.PriorityQueue[tuple[int, int, float, K]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        # Requests that wait or are being handled: what ends them, None while nothing does.
        self._errors: dict[int, RequestError | None] = {}
        self._current: int | None = None
        self._closed: RequestError | None = None
        with deep_stack():
            threading.Thread(target=self._run, name="tokenizer", daemon=True).start()

    @property
    def busy(self) -> bool:
        return self._current is not None

    def put(self, request: K, size: int) -> None:
        """Queue a request. size: about how many bytes or ids it has."""
        with self._lock:
            if (error := self._closed) is None:
                self._errors[request.key] = None
        if error is not None:
            self._refuse(request.key, error)
        else:
            self._queue.put((size // _LANE_BYTES, next(self._numbers), time.monotonic(), request))

    def end(self, key: int, error: RequestError) -> bool:
        """End a request that waits or is being handled. False where it is not here any more."""
        with self._lock:
            if key not in self._errors:
                return False
            if key == self._current:
                self._errors[key] = error
                return True
            del self._errors[key]
        self._refuse(key, error)
        return True

    def close(self, error: RequestError) -> None:
        """End all that is here, and what comes later."""
        with self._lock:
            self._closed = error
            keys = list(self._errors)
        for key in keys:
            self.end(key, error)

    def _run(self) -> None:
        while True:
            _, _, arrived, request = self._queue.get()
            with self._lock:
                if request.key not in self._errors:
                    continue
                self._current = request.key
            self._handle(request, arrived, functools.partial(self._check, request.key))
            with self._lock:
                self._current = None
                error = self._errors.pop(request.key)
            if error is not None:
                self._ended(request.key)

    def _check(self, key: int) -> None:
        if (error := self._errors[key]) is not None:
            raise error
