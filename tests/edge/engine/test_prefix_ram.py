"""Prefixes in RAM: what left its slot comes back, within the bound, and changes no text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.backends.base import Row
from edge.backends.fake import FakeBackend
from edge.engine import protocol as msg
from edge.engine.kv_cache import KVCache
from edge.engine.prefix_ram import PrefixRam
from edge.engine.prefix_store import common
from tests.support.backends import Maker
from tests.support.desk import Desk

LIMIT = 2**20


def ids(*tokens: int) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


def shared(ram: PrefixRam, *tokens: int) -> int:
    match = ram.best(ids(*tokens))
    return match[0] if match else 0


def test_the_longest_common_beginning_is_found() -> None:
    ram = PrefixRam(LIMIT)
    assert ram.best(ids(1, 2, 3)) is None
    for tokens in ((1, 2, 3), (1, 2, 300, 4), (1, 2, 300, 5, 6), (7,)):
        ram.save(ids(*tokens), b"x")
    assert shared(ram, 1, 2, 300, 5) == 4
    assert shared(ram, 1, 2, 300, 4, 9) == 4
    assert shared(ram, 1, 2, 9) == 2
    assert shared(ram, 8, 1) == 0
    assert ram.covers(ids(1, 2, 300)) and ram.covers(ids(7)) and not ram.covers(ids(7, 7))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12), st.data())
def test_a_search_finds_what_looking_at_each_finds(kept: list[list[int]], data: st.DataObject) -> None:
    ram = PrefixRam(LIMIT)
    for tokens in kept:
        if not ram.covers(ids(*tokens)):
            ram.save(ids(*tokens), b"x")
    prompt = ids(*data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=8)))
    match = ram.best(prompt)
    assert (match[0] if match else 0) == max((common(ids(*t), prompt) for t in kept), default=0)
    if match:
        assert common(match[1].tokens, prompt) == match[0]


def test_the_least_recently_used_leaves_and_the_bound_holds() -> None:
    ram = PrefixRam(25)
    ram.save(ids(1, 1), b"z" * 10)
    ram.save(ids(2, 2), b"z" * 10)
    assert ram.covers(ids(1))
    ram.save(ids(3, 3), b"z" * 10)
    assert [shared(ram, n, n) for n in (1, 2, 3)] == [2, 0, 2]
    assert (ram.bytes, ram.evictions) == (20, 1)
    ram.save(ids(4), b"z" * 26)
    assert (ram.bytes, ram.evictions) == (20, 1)


def test_room_is_made_before_a_copy_is() -> None:
    ram = PrefixRam(25)
    assert ram.make_room(100)
    for n in (1, 2):
        ram.save(ids(n, n), b"z" * 10)
    assert not ram.make_room(6) and ram.bytes == 20
    assert ram.make_room(2) and ram.bytes == 10
    assert [shared(ram, n, n) for n in (1, 2)] == [0, 2]
    assert ram.make_room(5) and ram.bytes == 0


def test_a_beginning_is_not_kept_beside_the_whole() -> None:
    ram = PrefixRam(LIMIT)
    for tokens in ((1,), (1, 2), (2, 2), (1, 2, 3)):
        ram.save(ids(*tokens), b"x" * 5)
    assert (ram.bytes, ram.evictions) == (10, 0)
    assert (shared(ram, 1, 2, 3), shared(ram, 2, 2)) == (3, 2)


def test_what_a_slot_holds_whole_is_not_kept_twice() -> None:
    ram = PrefixRam(LIMIT)
    ram.save(ids(1, 2, 3), b"abc")
    match = ram.best(ids(1, 2, 9))
    assert match is not None
    ram.use(match[1], match[0])
    assert (ram.hits, ram.bytes) == (1, 3)
    match = ram.best(ids(1, 2, 3, 4))
    assert match is not None
    ram.use(match[1], match[0])
    assert (ram.hits, ram.bytes, shared(ram, 1)) == (2, 0, 0)


def test_more_prompts_than_slots_are_read_once(make: Maker) -> None:
    prompts = [f"{n} of five prompts that are asked for twice" for n in range(5)]
    plain, kept = Desk(make(slots=2)), Desk(make(slots=2), ram=PrefixRam(LIMIT))
    asked = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}
    for desk in (plain, kept):
        for slot in range(2):
            desk.backend.truncate(slot, 0)
        for key in range(10):
            desk.submit(key, prompts[key % 5], **asked)
            desk.idle()
    assert [plain.made(key) for key in range(10)] == [kept.made(key) for key in range(10)]
    for key in range(5, 10):
        assert kept.done(key).cached_tokens == kept.done(key).prompt_tokens - 1
        assert plain.done(key).cached_tokens < 8
    stats = [event for event in kept.events if isinstance(event, msg.Stats)][-1]
    assert stats.ram_hits == 5 and 0 < stats.ram_bytes <= LIMIT and stats.ram_evictions == 0


def test_a_conversation_goes_on_where_it_left_its_slot(make: Maker) -> None:
    desk = Desk(make(slots=1), ram=PrefixRam(LIMIT))
    first = "the beginning of a longer talk, "
    asked = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    for key, prompt in enumerate((first, "somebody else asks something", first + "and more of it")):
        desk.submit(key, prompt, **asked)
        desk.idle()
    # A begin token may be one more.
    assert desk.done(2).cached_tokens - len(first) in (0, 1)


def test_without_reuse_nothing_is_kept_and_nothing_taken() -> None:
    ram = PrefixRam(LIMIT)
    desk = Desk(FakeBackend(slots=1), ram=ram)
    for key, (prompt, reuse) in enumerate(
        [("a secret that nobody shares", False), ("b" * 20, True), ("c" * 20, True), ("b" * 20, False)]
    ):
        desk.submit(key, prompt, reuse=reuse, max_tokens=2, temperature=0.0)
        desk.idle()
    assert shared(ram, *b"a secret") == 0
    assert shared(ram, *b"b" * 20) == 20
    assert desk.done(3).cached_tokens == ram.hits == 0


def test_little_gain_is_not_worth_a_copy() -> None:
    backend, ram = FakeBackend(slots=1, context=2048, batch=2048), PrefixRam(2**26)
    cache = KVCache(backend, ram=ram)
    for tokens in ([1] * 15, [2] * 1600, [3] * 30):
        assert cache.acquire([*tokens, 0])[1] == 0  # type: ignore[index]
        backend.step([Row(0, 0, tokens, 0)])
        cache.extend(0, tokens)
        cache.release(0)
    # 15 tokens were not kept; 24 of 1600 are as quickly computed, 30 are not.
    for same, (prompt, want) in enumerate([([1] * 15, 0), ([2] * 24, 0), ([2] * 30, 30)]):
        assert cache.acquire([*prompt, 0]) == (0, want), same
        cache.release(0)


def test_long_texts_are_copied_while_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    backend, ram = FakeBackend(slots=2, context=4096, batch=4096), PrefixRam(98_304)
    save = backend.save
    monkeypatch.setattr(backend, "save", lambda slot: saved.append(slot) or save(slot))
    desk = Desk(backend, ram=ram)
    texts = ["a" * 2100, "b" * 2000, "c" * 2100, "d" * 40]
    for key, text in enumerate(texts[:2]):
        desk.submit(key, text, max_tokens=1)
        desk.idle()
        desk.engine.turn()
    # Not again, and not the shorter one.
    assert saved == [0] and shared(ram, *texts[0].encode()) == 2100
    desk.submit(2, texts[2], max_tokens=1)
    desk.idle()
    # It takes the first one's slot, whose copy is there; there is no room for another.
    desk.engine.turn()
    assert saved == [0] and shared(ram, *texts[2].encode()) == 0
    desk.submit(3, texts[3], max_tokens=1)
    desk.idle()
    assert saved == [0, 1] and ram.evictions == 1


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [None, 96])
@settings(max_examples=60)
@given(data=st.data())
def test_any_mix_of_requests_has_the_texts_of_an_engine_without_it(
    capacity: int | None, data: st.DataObject
) -> None:
    """Random prompts with common beginnings, cancelled or not, in little room: every token is the same."""
    words = st.lists(st.sampled_from(["aaaaaaaa", "bbbbbbbb", "cccccccc"]), min_size=1, max_size=6)
    requests = data.draw(st.lists(st.tuples(words, st.integers(0, 3), st.booleans()), max_size=14))
    limit = data.draw(st.sampled_from([1500, 6000, LIMIT]))
    texts = []
    for ram in (None, PrefixRam(limit)):
        backend = FakeBackend(slots=3, context=64, capacity=capacity)
        desk = Desk(backend, ram=ram)
        for key, (prompt, turns, reuse) in enumerate(requests):
            desk.submit(key, "".join(prompt), reuse=reuse, max_tokens=6, temperature=0.0, ignore_eos=True)
            desk.turns(turns)
            free = desk.engine.cache.free_cells()
            assert free is None or capacity is None or capacity - free == backend.used()
            if ram is not None:
                assert ram.bytes <= limit
        desk.run()
        texts.append([desk.text(key) for key in range(len(requests))])
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_the_engine_with_all_of_it(make: Maker) -> None:
    """Random work over real backends: a copy in RAM gives the tokens that computing gives."""
    rng = np.random.default_rng(3)
    heads = ["".join(rng.choice(list("abcdef "), 40)) for _ in range(5)]
    asked = [heads[rng.integers(5)] + "xyz"[: rng.integers(4)] for _ in range(30)]
    texts = []
    for ram in (None, PrefixRam(LIMIT)):
        desk = Desk(make(slots=2), ram=ram)
        for key, prompt in enumerate(asked):
            desk.submit(key, prompt, temperature=0.0, max_tokens=4)
            desk.turns(int(rng.integers(1, 8)))
        desk.run()
        texts.append([desk.text(key) for key in range(30)])
    assert texts[0] == texts[1]
    assert ram is not None and ram.hits > 5
