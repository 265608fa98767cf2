"""Definitions of the figures, on samples whose times are known."""

import math

import pytest

from bench.measure import metrics
from bench.measure.metrics import Sample


def sample(start: float = 10.0, *, wanted: int = 5, got: int | None = 5, **given: object) -> Sample:
    """Events at 0.5 (1 token), 0.6 (1) and 0.9 (3 tokens) after `start`; the end at 1.0."""
    events = [(start + 0.5, 1), (start + 0.6, 1), (start + 0.9, 3)]
    return Sample(
        client=0,
        prompt=0,
        wanted=wanted,
        start=start,
        end=start + 1.0,
        events=events,
        completion_tokens=got,
        **given,  # type: ignore[arg-type]
    )


def test_times_of_one_answer() -> None:
    s = sample()
    assert metrics.ttft(s) == pytest.approx(0.5)
    assert metrics.itl(s) == pytest.approx([0.1, 0.3])
    # Four tokens after the first, in 0.4 s: several in one event count singly.
    assert metrics.tpot(s) == pytest.approx(0.1)
    assert metrics.e2e(s) == pytest.approx(1.0)


def test_an_answer_in_one_piece_has_no_gaps() -> None:
    s = Sample(client=0, prompt=0, wanted=5, start=1.0, end=3.0, events=[(3.0, 5)], completion_tokens=5)
    assert metrics.ttft(s) == pytest.approx(2.0)
    assert metrics.itl(s) == []
    assert metrics.tpot(s) is None


def test_nothing_came() -> None:
    s = Sample(client=0, prompt=0, wanted=5, start=1.0, end=3.0, error="refused")
    assert (metrics.ttft(s), metrics.tpot(s), s.state) == (None, None, "error")


def test_states() -> None:
    assert sample().state == "ok"
    assert sample(got=4).state == "incomplete"
    assert sample(got=None).state == "incomplete"
    assert sample(error="HTTP 500").state == "error"


def test_rates_span_the_whole_loop_and_count_complete_answers_only() -> None:
    samples = [sample(10.0), sample(11.0), sample(10.5, got=3), sample(10.2, error="x")]
    assert metrics.wall(samples) == pytest.approx(2.0)
    assert metrics.token_rate(samples) == pytest.approx(10 / 2.0)
    assert metrics.request_rate(samples) == pytest.approx(2 / 2.0)


def test_summary_keeps_the_unfinished_apart() -> None:
    found = metrics.summary([sample(10.0), sample(12.0), sample(14.0, got=3), sample(15.0, error="x")])
    assert (found["requests"], found["complete"], found["incomplete"], found["errors"]) == (4, 2, 1, 1)
    assert found["ttft_s"]["n"] == 2
    assert found["ttft_s"]["p50"] == pytest.approx(0.5)
    assert found["itl_s"]["max"] == pytest.approx(0.3)
    assert found["e2e_s"]["p95"] == pytest.approx(1.0)


def test_no_samples() -> None:
    found = metrics.summary([])
    assert found["tokens_per_s"] == 0.0
    assert found["e2e_s"]["p50"] is None
    assert found["e2e_s"]["intervals"]["p50"] is None


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([1, 2, 3, 4], 50, 2.5), ([1, 2, 3, 4], 100, 4), ([7], 95, 7), ([], 50, None)],
)
def test_percentile(values: list[float], q: float, expected: float | None) -> None:
    assert metrics.percentile(values, q) == expected


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    import numpy as np

    random = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        low, high = metrics.interval(list(random.normal(5.0, 1.0, 40)), draws=300, seed=seed)  # type: ignore[misc]
        held += low <= 5.0 <= high
    assert 180 <= held <= 200


def test_interval_is_repeatable_and_shy_of_few_values() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert metrics.interval(values, seed=3) == metrics.interval(values, seed=3)
    assert metrics.interval([1.0, 2.0]) is None


def test_ratio_is_the_same_from_either_side() -> None:
    there = metrics.ratio([10.0, 40.0], [5.0, 5.0])
    back = metrics.ratio([5.0, 5.0], [10.0, 40.0])
    assert there is not None and back is not None
    assert (there.value, there.low, there.high, there.pairs) == (pytest.approx(4.0), 2.0, 8.0, 2)
    assert math.isclose(there.value * back.value, 1.0)


def test_ratio_leaves_out_pairs_without_a_side() -> None:
    found = metrics.ratio([10.0, None, 9.0], [5.0, 5.0, None])
    assert found is not None and found.pairs == 1 and found.value == 2.0
    assert metrics.ratio([None], [1.0]) is None


def test_record_is_relative_to_the_start() -> None:
    row = sample().record()
    assert row["events"] == [[0.5, 1], [0.6, 1], [0.9, 3]]
    assert (row["end"], row["state"]) == (1.0, "ok")
