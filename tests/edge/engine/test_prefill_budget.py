"""How many prompt tokens a step may hold beside those that run."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge.engine.prefill_budget import SIZES, Newcomers, PrefillBudget, StepTimes


def one(key: int = 1) -> Newcomers:
    return Newcomers(1, 2000, key, key)


def test_the_budget_bounds_what_a_prompt_adds_to_a_step() -> None:
    budget = PrefillBudget(512)
    budget.learn(4, 0, 0.080)
    budget.learn(0, 400, 2.0)
    assert budget.chunk(4, one()) == int(0.7 * 0.080 / 0.005)
    chunks = []
    for _ in range(100):
        chunks.append(budget.chunk(4, one()))
        budget.learn(4, chunks[-1], 0.080 + chunks[-1] * 0.002)
    # Which adds 0.048 of 0.056 seconds; 32 would add 0.064, and is tried now and then.
    assert chunks.count(24) > 80
    assert max(chunks) == 32
    assert budget.chunk(0, one()) == 80


def test_the_budget_takes_what_a_pass_of_its_own_costs_anyway() -> None:
    # With per-slot KV buffers a chunk takes a pass of its own: the same for 2 tokens and for 16.
    def took(n: int) -> float:
        return 0.085 + 0.001 * n + 0.006 * max(0, n - 16)

    for first in (None, 0.006, 0.03):
        budget = PrefillBudget(512)
        budget.learn(8, 0, 0.120)
        if first is not None:
            budget.learn(0, 100, 100 * first)
        chunks = []
        for _ in range(400):
            chunks.append(budget.chunk(8, one()))
            budget.learn(8, chunks[-1], 0.120 + took(chunks[-1]))
        late = chunks[100:]
        assert sum(n == 16 for n in late) > 0.95 * len(late)
        # A longer one is tried now and then, seldom enough that no one in twenty waits for it.
        assert set(late) <= {16, 24, 32}


@pytest.mark.parametrize(("fixed", "each", "steps"), [(0.004, 5e-6, 4), (0.0, 1e-3, 40)])
def test_a_long_prompt_beside_streams_is_read_in_few_steps(fixed: float, each: float, steps: int) -> None:
    """A GPU reads thousands of tokens hardly slower than four; a processor takes as long for each."""
    budget = PrefillBudget(2048)
    budget.learn(16, 0, 0.003)
    left, chunks = 2000, []
    budget.learn(16, 4, 0.003 + fixed + 4 * each)
    while left:
        chunks.append(min(left, budget.chunk(16, Newcomers(1, left, 1, 1))))
        # The next size is tried once, whatever the last one took.
        assert fixed + chunks[-1] * each <= 0.057 * 1.5
        budget.learn(16, chunks[-1], 0.003 + fixed + chunks[-1] * each)
        left -= chunks[-1]
    assert len(chunks) <= steps + 5


def test_the_budget_goes_back_where_a_longer_chunk_was_slow_by_chance() -> None:
    budget = PrefillBudget(512)
    budget.learn(4, 0, 0.100)
    chunks = []
    for n in range(200):
        chunks.append(budget.chunk(4, one()))
        slow = 0.5 if n == 50 else 0.0
        budget.learn(4, chunks[-1], 0.100 + chunks[-1] * 0.004 + slow)
    assert chunks[49] == 16 and 8 <= chunks[51] < 16
    assert min(chunks[100:]) == 16


def test_the_budget_lets_a_burst_go_first_to_its_last_prompt() -> None:
    budget = PrefillBudget(512)
    budget.learn(4, 0, 0.050)
    budget.learn(0, 400, 0.400)
    polite = int(0.7 * 0.050 / 0.001)
    assert budget.chunk(4, one(5)) == polite
    assert budget.chunk(12, Newcomers(2, 200, 6, 7)) == polite
    assert budget.chunk(4, Newcomers(2, 200, 8, 9)) == 400
    # The last of those two, beside many: still theirs; one that comes later is not.
    assert budget.chunk(12, one(9)) == 512
    assert budget.chunk(12, Newcomers(2, 200, 9, 10)) == 400
    assert budget.chunk(12, one(10)) == polite


def test_the_budget_reads_a_large_burst_in_larger_steps_within_a_bound() -> None:
    budget = PrefillBudget(4096)
    budget.learn(0, 400, 0.400)
    assert budget.chunk(0, Newcomers(8, 800, 1, 8)) == 400
    assert budget.chunk(0, Newcomers(8, 2000, 1, 8)) == 1000
    assert budget.chunk(1, Newcomers(8, 16000, 1, 8)) == 1500


def test_the_budget_knows_steps_of_each_width() -> None:
    budget = PrefillBudget(512)
    for rows, seconds in ((1, 0.010), (9, 0.050), (16, 0.070)):
        budget.learn(rows, 0, seconds)
    assert budget.times.at(5) == pytest.approx(0.030)
    assert (budget.times.at(1), budget.times.at(16), budget.times.at(32)) == (0.010, 0.070, 0.070)
    # A step that is short anyway may become as long as nobody feels.
    budget.learn(0, 100, 0.1)
    assert budget.chunk(1, one()) in (49, 50)
    # A lone stream at the end does not make the next crowd's steps look short.
    assert budget.chunk(16, one()) == int(0.7 * 0.070 / 0.001)


def test_step_times_say_how_much_longer_a_wider_step_is() -> None:
    times = StepTimes()
    assert times.at(3) is None and times.longer(1, 2) == pytest.approx(1.3)
    for rows, seconds in ((1, 0.010), (9, 0.030), (17, 0.025)):
        times.learn(rows, seconds)
    assert times.longer(1, 8) == pytest.approx(3.0)
    assert times.longer(1, 4) == pytest.approx(2.0)
    # More rows never shorten a step; beyond what was seen each costs half of what those did.
    assert times.longer(9, 8) == 1.0
    assert times.longer(1, 20) == pytest.approx((0.025 + 4 * 0.015 / 16 / 2) / 0.010)
    assert times.longer(17, 2) == pytest.approx((0.025 + 2 * 0.015 / 16 / 2) / 0.025)


def test_a_wide_step_that_was_long_by_chance_is_thought_shorter_in_time() -> None:
    times, kept = StepTimes(fade=0.998), StepTimes()
    for one in (times, kept):
        one.learn(16, 10.0)
        for _ in range(1000):
            one.learn(1, 0.010)
    assert kept.longer(1, 15) == pytest.approx(1000)
    assert times.longer(1, 15) < 200


def test_one_wide_step_tells_of_all_widths_again() -> None:
    times = StepTimes(fade=0.99)
    for rows, seconds in ((1, 0.010), (2, 0.020), (4, 0.040)):
        times.learn(rows, seconds)
    assert times.longer(1, 3) == pytest.approx(4.0)
    for _ in range(300):
        times.learn(1, 0.010)
    # Nearly forgotten, but never shorter than the narrowest.
    assert 1.0 < times.longer(1, 1) < times.longer(1, 3) < 1.2
    times.learn(2, 0.020)
    assert times.longer(1, 1) == pytest.approx(2.0)
    assert times.longer(1, 3) == pytest.approx(4.0)


steps = st.tuples(
    st.integers(0, 20),  # streams that decode
    st.integers(0, 8),  # newcomers
    st.integers(1, 5000),  # tokens of theirs
    st.floats(0.0, 3.0),  # seconds that the step takes
)


@example([(1, 0, 1, 0.0), (1, 1, 4, 1.0), (1, 1, 1, 0.0)], 33)
@given(st.lists(steps, max_size=40), st.sampled_from([4, 33, 512]))
def test_whatever_steps_take_the_budget_stays_within_its_bounds(
    history: list[tuple[int, int, int, float]], batch: int
) -> None:
    budget = PrefillBudget(batch)
    for key, (decoding, count, tokens, seconds) in enumerate(history):
        new = Newcomers(count, tokens, key, key + count) if count else Newcomers()
        chunk = budget.chunk(decoding, new)
        assert (chunk == 0) == (count == 0)
        assert chunk == 0 or 4 <= chunk <= batch
        budget.learn(decoding, min(chunk, tokens), seconds)


@given(
    st.lists(st.tuples(st.integers(1, 32), st.floats(1e-4, 1.0)), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(1, 16),
)
def test_more_rows_are_never_expected_to_be_quicker(
    seen: list[tuple[int, float]], rows: int, more: int
) -> None:
    times = StepTimes()
    for width, seconds in seen:
        times.learn(width, seconds)
    assert 1.0 <= times.longer(rows, more) < float("inf")
    low, high = min(seconds for _, seconds in seen), max(seconds for _, seconds in seen)
    expected = times.at(rows)
    assert expected is not None
    assert low * 0.999 <= expected <= high * 1.001


def test_a_chunk_grows_from_the_smallest_where_fewer_tokens_were_seen() -> None:
    """One prompt of four tokens took a second: the next size is tried, and no step is filled."""
    budget = PrefillBudget(512)
    budget.learn(1, 0, 0.0)
    budget.learn(1, 4, 1.0)
    assert budget.chunk(1, Newcomers(1, 300, 2, 3)) <= SIZES[1]
