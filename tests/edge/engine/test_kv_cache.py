"""Slots and prefixes: what is reused, copied, evicted, and counted."""

import numpy as np

from edge.backends.base import Row
from edge.backends.fake import FakeBackend
from edge.engine.kv_cache import KVCache


def fill(backend: FakeBackend, cache: KVCache, slot: int, tokens: list[int]) -> None:
    backend.step([Row(slot, cache.lengths[slot], tokens, 0)])
    cache.extend(slot, tokens)


def used(cache: KVCache) -> int:
    free = cache.free_cells()
    assert free is not None
    return 64 - free


def test_the_longest_prefix_is_reused_in_place() -> None:
    backend = FakeBackend(slots=3)
    cache = KVCache(backend)
    assert cache.acquire([1, 2, 3]) == (0, 0)
    fill(backend, cache, 0, [1, 2, 3])
    cache.release(0)
    assert cache.acquire([1, 2, 3, 4]) == (0, 3)
    assert cache.lengths == [3, 0, 0]


def test_the_last_token_is_always_computed() -> None:
    backend = FakeBackend(slots=2)
    cache = KVCache(backend)
    cache.acquire([1, 2, 3])
    fill(backend, cache, 0, [1, 2, 3])
    cache.release(0)
    assert cache.acquire([1, 2, 3]) == (0, 2)


def test_a_busy_slots_prefix_is_copied() -> None:
    backend = FakeBackend(slots=2)
    cache = KVCache(backend)
    cache.acquire([1, 2, 3, 4])
    fill(backend, cache, 0, [1, 2, 3, 4])
    assert cache.acquire([1, 2, 9]) == (1, 2)
    assert cache.lengths == [4, 2]
    assert cache.acquire([1]) is None


def test_a_long_conversation_is_not_cut_for_a_short_prefix() -> None:
    backend = FakeBackend(slots=2)
    cache = KVCache(backend)
    cache.acquire(list(range(10)))
    fill(backend, cache, 0, list(range(10)))
    cache.release(0)
    assert cache.acquire([0, 1, 99]) == (1, 2)
    assert cache.lengths == [10, 2]


def test_without_reuse_nothing_is_taken_over() -> None:
    backend = FakeBackend(slots=1)
    cache = KVCache(backend)
    cache.acquire([1, 2, 3])
    fill(backend, cache, 0, [1, 2, 3])
    cache.release(0)
    assert cache.acquire([1, 2, 3], reuse=False) == (0, 0)
    assert cache.lengths == [0]


def test_least_recently_used_goes_first() -> None:
    backend = FakeBackend(slots=2, context=64, capacity=64)
    cache = KVCache(backend)
    for tokens in ([1, 2, 3], [7, 8, 9]):
        taken = cache.acquire(tokens)
        assert taken is not None
        fill(backend, cache, taken[0], tokens)
        cache.release(taken[0])
    assert cache.evict_idle()
    assert cache.lengths == [0, 3]
    assert cache.evict_idle()
    assert not cache.evict_idle()


def test_shared_cells_count_once_and_live_until_the_last_holder() -> None:
    backend = FakeBackend(slots=3, context=64, capacity=64)
    cache = KVCache(backend)
    cache.acquire([1, 2, 3, 4])
    fill(backend, cache, 0, [1, 2, 3, 4])
    cache.acquire([1, 2, 3, 5])
    fill(backend, cache, 1, [5])
    assert (used(cache), backend.used()) == (5, 5)
    assert cache.available_cells() == 59
    cache.release(0, keep=False)
    assert (used(cache), backend.used()) == (4, 4)
    cache.release(1)
    assert cache.available_cells() == 64
    assert cache.evict_idle()
    assert used(cache) == 0


def test_books_and_backend_agree_after_random_work() -> None:
    rng = np.random.default_rng(5)
    backend = FakeBackend(slots=4, context=64, capacity=256)
    cache = KVCache(backend)
    mine: dict[int, list[int]] = {}
    for _ in range(400):
        kind = rng.integers(4)
        if kind == 0:
            prompt = rng.integers(0, 2, rng.integers(2, 12)).tolist()
            taken = cache.acquire(prompt)
            if taken is not None:
                slot, n = taken
                fill(backend, cache, slot, prompt[n:])
                mine[slot] = prompt
        elif kind == 1 and mine:
            slot = int(rng.choice(list(mine)))
            cache.release(slot, keep=bool(rng.integers(2)))
            del mine[slot]
        elif kind == 2 and mine:
            slot = int(rng.choice(list(mine)))
            cache.truncate(slot, int(rng.integers(0, cache.lengths[slot] + 1)))
        else:
            cache.evict_idle()
        free = cache.free_cells()
        assert free is not None
        assert 256 - free == backend.used()


def test_requests_are_neighbours_with_per_slot_buffers() -> None:
    backend = FakeBackend(slots=6)
    cache = KVCache(backend)
    for slot in range(6):
        assert cache.acquire([slot], reuse=False) == (slot, 0)
    for slot in (3, 0, 5, 4, 1):
        fill(backend, cache, slot, [slot])
        cache.release(slot)
    # 2 is busy: of those beside it the one that was used least recently, then what is beside both.
    assert [cache.acquire([9])[0] for _ in range(3)] == [3, 4, 5]  # type: ignore[index]
    cache.release(3)
    assert cache.acquire([8]) == (3, 0)


def test_in_a_unified_cache_any_slot_is_as_good() -> None:
    backend = FakeBackend(slots=4, capacity=64)
    cache = KVCache(backend)
    for slot in range(4):
        assert cache.acquire([slot], reuse=False) == (slot, 0)
    for slot in (3, 1, 0):
        fill(backend, cache, slot, [slot])
        cache.release(slot)
    assert [cache.acquire([9])[0] for _ in range(2)] == [3, 1]  # type: ignore[index]
