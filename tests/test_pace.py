"""How many prompt tokens a step may hold beside those that run."""

from __future__ import annotations

import pytest

from edge.pace import Newcomers, Pace


def one(key: int = 1) -> Newcomers:
    return Newcomers(1, 2000, key, key)


def test_pace_bounds_what_a_prompt_adds_to_a_step() -> None:
    pace = Pace(512)
    pace.learn(4, 0, 0.080)
    pace.learn(0, 400, 2.0)
    assert pace.chunk(4, one()) == int(0.7 * 0.080 / 0.005)
    for _ in range(20):
        pace.learn(4, 16, 0.080 + 16 * 0.002)
    assert 26 <= pace.chunk(4, one()) <= 28
    assert pace.chunk(0, one()) == 80


def test_pace_lets_a_burst_go_first_to_its_last_prompt() -> None:
    pace = Pace(512)
    pace.learn(4, 0, 0.050)
    pace.learn(0, 400, 0.400)
    polite = int(0.7 * 0.050 / 0.001)
    assert pace.chunk(4, one(5)) == polite
    assert pace.chunk(12, Newcomers(2, 200, 6, 7)) == polite
    assert pace.chunk(4, Newcomers(2, 200, 8, 9)) == 400
    # The last of those two, beside many: still theirs; one that comes later is not.
    assert pace.chunk(12, one(9)) == 512
    assert pace.chunk(12, Newcomers(2, 200, 9, 10)) == 400
    assert pace.chunk(12, one(10)) == polite


def test_pace_reads_a_large_burst_in_larger_steps_within_a_bound() -> None:
    pace = Pace(4096)
    pace.learn(0, 400, 0.400)
    assert pace.chunk(0, Newcomers(8, 800, 1, 8)) == 400
    assert pace.chunk(0, Newcomers(8, 2000, 1, 8)) == 1000
    assert pace.chunk(1, Newcomers(8, 16000, 1, 8)) == 1500


def test_pace_knows_steps_of_each_width() -> None:
    pace = Pace(512)
    for rows, seconds in ((1, 0.010), (9, 0.050), (16, 0.070)):
        pace.learn(rows, 0, seconds)
    assert pace.quiet(5) == pytest.approx(0.030)
    assert (pace.quiet(1), pace.quiet(16), pace.quiet(32)) == (0.010, 0.070, 0.070)
    # A step that is short anyway may become as long as nobody feels.
    pace.learn(0, 100, 0.1)
    assert pace.chunk(1, one()) in (49, 50)
    # A lone stream at the end does not make the next crowd's steps look short.
    assert pace.chunk(16, one()) == int(0.7 * 0.070 / 0.001)
