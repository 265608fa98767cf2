"""Long texts become ids, or are refused, in bounded time and beside what runs."""

from __future__ import annotations

import dataclasses
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.backends.base import Backend, BackendInfo
from edge.backends.fake import FakeBackend
from edge.engine import protocol as msg
from edge.engine import tokenize
from edge.engine.core import Engine
from edge.engine.grammar import Constraint
from edge.engine.request import prompt_tokens
from edge.engine.sampling import Params
from edge.engine.tokenize import BLOCK, COUNTED_BYTES, TokenizerThread, blocks
from edge.engine.worker import Router
from edge.errors import RequestError
from tests.support.backends import Maker

GONE = RequestError("gone", status=499, code="client_closed")
WORDS = ("word", " ", "  ", "\n", "a", "é", "你好", "<", "|", "<|", ">", "▁", "\t")


# -- blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("count", [3, BLOCK, 5 * BLOCK])
def test_blocks_give_the_ids_of_the_whole(make: Maker, *, special: bool, count: int) -> None:
    backend = make()
    marks = backend.marks(special=True) or ("<|user|>", "<|end|>")
    rng = random.Random(count)
    cuts = 0
    for _ in range(20):
        text = "".join(
            rng.choice(WORDS) * rng.choice((0, 0, 1, 3)) + rng.choice(marks) for _ in range(count)
        ) + rng.choice(WORDS)
        cuts += len(list(blocks(text, backend.marks(special=special)))) - 1
        assert tokenize.encode(backend, text, special=special) == backend.encode(text, special=special)
    if backend.marks(special=special):
        assert (cuts > 0) == (count > BLOCK)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=5, unique=True),
    st.text("abc", min_size=300, max_size=600),
)
def test_a_cut_parts_no_mark(marks: list[str], text: str) -> None:
    parts = list(blocks(text, tuple(marks)))
    assert "".join(parts) == text
    place = 0
    for part in parts[:-1]:
        place += len(part)
        for mark in marks:
            assert not any(text.startswith(mark, place - back) for back in range(1, len(mark)))


def test_a_part_begins_with_a_mark_and_holds_few() -> None:
    parts = list(blocks("x" + "<a>" * 1000 + "y", ("<a>", "<ab>")))
    assert [part.count("<a>") for part in parts] == [BLOCK] * 15 + [40]
    assert all(part.startswith("<a>") for part in parts[1:])
    # Ordinary texts are left whole, and so is one whose every place is inside another mark.
    assert list(blocks("<a> b" * BLOCK, ("<a>",))) == ["<a> b" * BLOCK]
    assert list(blocks("a" * 1000, ("aaa",))) == ["a" * 1000]
    assert list(blocks("abc", ())) == ["abc"]


# -- limits ----------------------------------------------------------------------------------------------


class Marked(FakeBackend):
    """A fake with one mark, which is a token; `calls` are the texts that it was given."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.calls: list[str] = []
        self.info = dataclasses.replace(self.info, token_bytes=4)

    def marks(self, *, special: bool) -> tuple[str, ...]:
        return ("<e>",) if special else ()

    def encode(self, text: str, *, special: bool) -> list[int]:
        self.calls.append(text)
        return list(text.replace("<e>", "\0").encode("utf-8"))


@pytest.mark.parametrize("text", ["x" * 200_000, "é" * 100_000, "<e>" * 70_000])
def test_a_prompt_that_its_bytes_prove_too_long_is_not_tokenized(text: str) -> None:
    backend = Marked(context=50_000)
    with pytest.raises(RequestError, match=r"at least 5\d{4} tokens.*context holds 50000") as caught:
        prompt_tokens(backend, text)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert backend.calls == []
    # It may have one token less than this.
    with pytest.raises(RequestError, match="has 199996 tokens"):
        prompt_tokens(backend, "x" * 199_996, special=False)
    assert len(backend.calls) == 1


def test_tokenizing_stops_where_the_prompt_is_too_long() -> None:
    backend = Marked(context=500)
    backend.info = dataclasses.replace(backend.info, token_bytes=0)
    with pytest.raises(RequestError, match=f"at least {8 * BLOCK} tokens"):
        prompt_tokens(backend, "<e>" * COUNTED_BYTES)
    assert len(backend.calls) == 8
    # What is not far too long is counted.
    with pytest.raises(RequestError, match="has 10000 tokens"):
        prompt_tokens(backend, "<e>" * 10_000)


def test_spaces_that_a_mark_swallows_prove_nothing() -> None:
    backend = Marked(context=100)
    backend.info = dataclasses.replace(backend.info, strips=True)
    with pytest.raises(RequestError, match="the prompt has 50000 tokens"):
        prompt_tokens(backend, " " * 50_000)
    with pytest.raises(RequestError, match="at least 12500 tokens"):
        prompt_tokens(backend, "x " * 50_000)


def test_no_token_of_a_backend_is_longer_than_it_says(make: Maker) -> None:
    backend = make()
    longest = max(
        *(len(backend.decode(token)) for token in range(backend.info.vocab)),
        *(len(mark.encode()) for mark in backend.marks(special=True)),
        0,
    )
    assert 0 < longest <= backend.info.token_bytes <= 9


# -- the thread ------------------------------------------------------------------------------------------


class Desk:
    """A tokenizer's thread whose first request waits, in `handle`, to be let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.handled: queue.Queue[int | str] = queue.Queue()
        self.refused: dict[int, RequestError] = {}
        self.late: queue.Queue[int] = queue.Queue()
        self.thread: TokenizerThread[msg.Decode] = TokenizerThread(
            self._handle, self.refused.__setitem__, self.late.put
        )

    def put(self, key: int, size: int = 1) -> None:
        self.thread.put(msg.Decode(key, []), size)

    def _handle(self, request: msg.Decode, arrived: float, check: Callable[[], None]) -> None:
        self.begun.set()
        assert self.go.wait(10.0) and arrived <= time.monotonic()
        try:
            check()
        except RequestError as error:
            self.handled.put(error.code)
        else:
            self.handled.put(request.key)


def test_what_waits_is_handled_in_turn_and_short_texts_first() -> None:
    desk = Desk()
    desk.put(1)
    assert desk.begun.wait(10.0) and desk.thread.busy
    for key, size in ((2, 10**6), (3, 500), (4, 10**6), (5, 1)):
        desk.put(key, size)
    desk.go.set()
    assert [desk.handled.get(timeout=10.0) for _ in range(5)] == [1, 3, 5, 2, 4]
    assert not desk.refused


def test_a_request_is_ended_while_it_waits_or_is_handled() -> None:
    desk = Desk()
    desk.put(1)
    desk.put(2)
    desk.put(3)
    assert desk.begun.wait(10.0)
    assert desk.thread.end(2, GONE) and desk.refused == {2: GONE}
    assert desk.thread.end(1, GONE) and not desk.thread.end(9, GONE)
    desk.go.set()
    assert [desk.handled.get(timeout=10.0) for _ in range(2)] == ["client_closed", 3]
    # Whoever handled it may have gone beyond its last look.
    assert desk.late.get(timeout=10.0) == 1
    assert list(desk.refused) == [2] and not desk.thread.end(3, GONE)


def test_closing_ends_what_is_here_and_what_comes() -> None:
    desk = Desk()
    desk.put(1)
    desk.put(2)
    assert desk.begun.wait(10.0)
    desk.thread.close(GONE)
    desk.put(3)
    assert list(desk.refused) == [2, 3]
    desk.go.set()
    assert desk.handled.get(timeout=10.0) == "client_closed"


# -- beside a stream -------------------------------------------------------------------------------------


class Wire:
    """A worker's link without a socket."""

    def __init__(self) -> None:
        self.requests: queue.Queue[msg.ToEngine | None] = queue.Queue()
        self.events: queue.Queue[tuple[float, msg.Event]] = queue.Queue()

    def receive(self) -> msg.ToEngine | None:
        return self.requests.get()

    def send(self, events: list[msg.Event]) -> None:
        # As on a socket, that much has to be written.
        msg.pack(events)
        for event in events:
            self.events.put((time.monotonic(), event))


class Borrowed(FakeBackend):
    """A fake with another's tokenizer."""

    def __init__(self, lender: Any, info: BackendInfo, **given: Any) -> None:
        super().__init__(**given)
        self._lender = lender
        self.info = dataclasses.replace(self.info, token_bytes=info.token_bytes, strips=info.strips)

    def marks(self, *, special: bool) -> tuple[str, ...]:
        marks: tuple[str, ...] = self._lender.marks(special=special)
        return marks

    def encode(self, text: str, *, special: bool) -> list[int]:
        return [token % 256 for token in self._lender.encode(text, special=special)]


class Bench:
    """A stream (key 1) over `backend` that runs on, and the gaps between its texts."""

    def __init__(self, backend: Backend) -> None:
        self.wire = Wire()
        self._engine = Engine(backend, self.wire.send)
        router = Router(self.wire, self._engine, backend)  # type: ignore[arg-type]
        for target in (self._engine.run, router.run):
            threading.Thread(target=target, daemon=True).start()
        self.ask(msg.Submit(1, "x", Params(ignore_eos=True)))
        self._last = self._wait(lambda event: isinstance(event, msg.Delta))[0]
        self.longest = 0.0

    def ask(self, *requests: msg.ToEngine) -> None:
        for request in requests:
            self.wire.requests.put(request)

    def _wait(self, wanted: Callable[[msg.Event], bool]) -> tuple[float, msg.Event]:
        while True:
            at, event = self.wire.events.get(timeout=60.0)
            if isinstance(event, msg.Delta) and event.key == 1 and hasattr(self, "_last"):
                self.longest = max(self.longest, at - self._last)
                self._last = at
            if wanted(event):
                return at, event

    def answers(self, count: int) -> list[tuple[float, msg.Event]]:
        """The next `count` answers to other requests, and when they came."""
        kinds = (msg.Done, msg.Refused, msg.Encoded)
        return [self._wait(lambda event: isinstance(event, kinds)) for _ in range(count)]

    def pause(self, seconds: float) -> float:
        """The longest gap of so many seconds without other requests."""
        until, self.longest = time.monotonic() + seconds, 0.0
        self._wait(lambda event: isinstance(event, msg.Delta) and time.monotonic() > until)
        return self.longest

    def close(self) -> None:
        self.ask(msg.Cancel(1), None)  # type: ignore[arg-type]
        self._wait(lambda event: isinstance(event, msg.Done))


@pytest.fixture(params=["llamacpp", "onnx"])
def lender(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    maker = Maker(request.param, tmp_path_factory.mktemp("lender"))
    yield maker()
    maker.close()


def test_a_short_request_waits_for_no_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text without marks is one call of native code, and so is the compiling of a constraint."""
    begun, go_on = threading.Semaphore(0), threading.Event()
    backend = FakeBackend(slots=4, context=2**16)
    encode = backend.encode

    def slow(text: str, *, special: bool) -> list[int]:
        if len(text) > 20_000:
            begun.release()
            assert go_on.wait(30.0)
        return encode(text, special=special)

    monkeypatch.setattr(backend, "encode", slow)
    bench = Bench(backend)
    bench.ask(msg.Encode(2, "x" * 30_000, special=True), msg.Encode(3, "x" * 30_000, special=True))
    try:
        assert begun.acquire(timeout=30.0)
        constraint = Constraint("regex", "a")
        bench.ask(msg.Submit(4, "x", Params(max_tokens=1), constraint=constraint))
        bench.ask(msg.Encode(5, "short", special=True), msg.Submit(6, "x", Params(max_tokens=1)))
        assert {event.key for _, event in bench.answers(2)} == {5, 6}  # type: ignore[union-attr]
        bench.ask(msg.Cancel(2), msg.Cancel(3))
        [(_, waiting)] = bench.answers(1)
        assert isinstance(waiting, msg.Refused) and (waiting.key, waiting.code) == (3, "client_closed")
    finally:
        go_on.set()
    assert {event.key for _, event in bench.answers(2)} == {2, 4}  # type: ignore[union-attr]
    bench.close()


@pytest.mark.timing
def test_64_of_the_longest_prompts_hold_no_stream_up(lender: Backend) -> None:
    context = 32768
    backend = Borrowed(lender, lender.info, slots=2, context=context, batch=512, step_s=0.002)
    mark = "<|end|>"
    largest = (context - 1) * backend.info.token_bytes
    texts = [
        (mark * largest)[:largest],
        ("word " * largest)[:largest],
        (f"{mark} a" * largest)[:largest],
    ]
    bench = Bench(backend)
    alone = bench.pause(1.0)
    bench.longest = 0.0
    bench.ask(*(msg.Submit(2 + i, texts[i % 3], Params(max_tokens=1)) for i in range(64)))
    for _, event in bench.answers(64):
        assert isinstance(event, msg.Refused) and event.code == "context_length_exceeded"
    assert bench.longest - alone <= 0.1, (bench.longest, alone)
    # They can be cancelled, and another request is not behind them.
    bench.ask(*(msg.Encode(100 + i, mark * 150_000, special=True) for i in range(8)))
    asked = time.monotonic()
    bench.ask(*(msg.Cancel(100 + i) for i in range(8)), msg.Encode(200, "a", special=True))
    events = bench.answers(9)
    assert sum(isinstance(event, msg.Refused) and event.status == 499 for _, event in events) >= 7
    assert events[-1][0] - asked < 0.5
    bench.close()


def test_many_marks_are_cut_into_small_blocks(make: Maker) -> None:
    backend = make()
    if not backend.marks(special=True):
        pytest.skip("it has no marks")
    text = "<|end|>" * 20_000
    whole = tokenize.encode(backend, text, special=True)
    assert len(whole) == 20_000 and len(set(whole)) == 1
    assert max(part.count("<|end|>") for part in blocks(text, backend.marks(special=True))) == BLOCK
