"""The sampler against plain formulas, and its distributions against counts."""

import math

import numpy as np
import pytest

from edge.backends.base import Candidates
from edge.engine.sampling import Params, Sampler, cut_to_nucleus

LOGITS = np.array([1.0, 3.0, 2.0, 0.5, -1.0, 2.5], np.float32)
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum()


def sampler(prompt: list[int] | None = None, stops: frozenset[int] = frozenset(), **given: object) -> Sampler:
    return Sampler(Params(**given), len(LOGITS), prompt or [], stops)  # type: ignore[arg-type]


def shares(n: int = 15000, logits: np.ndarray = LOGITS, **given: object) -> np.ndarray:
    drawn = sampler(seed=7, **given)
    counts = np.zeros(len(logits))
    for _ in range(n):
        counts[drawn.pick(logits.copy()).token] += 1
    return counts / n


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-6])
def test_greedy(temperature: float) -> None:
    assert sampler(temperature=temperature).pick(LOGITS.copy()).token == 1


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.full(1000, -np.inf, np.float32)
    logits[[5, 999]] = 1.0
    for given in ({}, {"top_k": 40}, {"top_p": 0.99}, {"min_p": 0.5}, {"top_k": 1}):
        drawn = Sampler(Params(seed=2, **given), 1000, [], frozenset())  # type: ignore[arg-type]
        got = {drawn.pick(logits.copy()).token for _ in range(60)}
        assert got == ({5} if given == {"top_k": 1} else {5, 999})


@pytest.mark.parametrize(
    ("given", "reach"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 0.0, "ignore_eos": True}, 3),
        ({"top_k": 5, "top_p": 0.8, "min_p": 0.01}, 5),
        ({"top_k": 20, "min_tokens": 3, "temperature": 2.0}, 22),
        ({"top_k": 5, "presence_penalty": 0.1}, 300),
        ({"top_k": 5, "logit_bias": {1: 1.0}}, 300),
        ({"temperature": 0.0, "logprobs": 0}, 300),
        ({"top_p": 0.5}, 300),
    ],
)
def test_no_more_logits_matter_than_it_reaches(given: dict[str, object], reach: int) -> None:
    rng = np.random.default_rng(0)
    whole, cut, among = (
        Sampler(Params(seed=1, **given), 300, [4], frozenset({7, 9}))  # type: ignore[arg-type]
        for _ in range(3)
    )
    assert whole.reach == reach
    for _ in range(200):
        # Many of them equal, and stops among the largest.
        logits = rng.integers(0, 12, 300).astype(np.float32)
        logits[[7, 9]] += 6
        few = np.full(300, -np.inf, np.float32)
        best = np.argsort(-logits, kind="stable")[: whole.reach]
        few[best] = logits[best]
        candidates = Candidates(best, logits[best])
        token = whole.pick(logits).token
        assert cut.pick(few).token == token
        if reach < 300:
            assert among.pick(candidates).token == token


def test_plain_sampling_has_the_models_distribution() -> None:
    assert np.abs(shares() - PROBS).max() < 0.014


def test_temperature() -> None:
    want = np.exp(LOGITS / 0.5) / np.exp(LOGITS / 0.5).sum()
    assert np.abs(shares(temperature=0.5) - want).max() < 0.014


@pytest.mark.parametrize(
    ("given", "kept"),
    [({"top_k": 2}, {1, 5}), ({"top_p": 0.6}, {1, 5}), ({"min_p": 0.3}, {1, 2, 5}), ({"top_p": 1e-9}, {1})],
)
def test_cuts_keep_the_right_tokens(given: dict[str, float], kept: set[int]) -> None:
    got = shares(4000, **given)
    assert set(np.flatnonzero(got)) == kept
    want = np.where(np.isin(np.arange(6), list(kept)), PROBS, 0)
    assert np.abs(got - want / want.sum()).max() < 0.03


def test_a_large_flat_vocabulary_is_cut_exactly() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=50_000).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits[order].astype(np.float64))
    keep = set(order[: int(np.searchsorted(np.cumsum(weights), 0.5 * weights.sum())) + 1].tolist())
    drawn = Sampler(Params(top_p=0.5, seed=1), 50_000, [], frozenset())
    assert all(drawn.pick(logits.copy()).token in keep for _ in range(40))


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 60.0])
def test_the_cut_without_sorting_keeps_what_sorting_keeps(share: float, spread: float) -> None:
    logits = np.random.default_rng(2).normal(0.0, spread, 20_000).astype(np.float32)
    weights = np.exp(logits - logits.max())
    goal = share * float(weights.sum(dtype=np.float64))
    order = np.argsort(-weights, kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order].astype(np.float64)), goal)) + 1
    want = np.zeros_like(weights)
    want[order[:count]] = weights[order[:count]]
    cut_to_nucleus(weights, goal)
    # Sums in another order may differ by a token of no weight at the very end.
    assert abs(np.count_nonzero(weights) - np.count_nonzero(want)) <= (share == 1.0)
    assert np.abs(weights - want).max() <= (weights[weights > 0].min() if share == 1.0 else 0.0)


def test_seed_repeats_and_differs() -> None:
    def run(seed: int) -> list[int]:
        drawn = sampler(seed=seed)
        return [drawn.pick(LOGITS.copy()).token for _ in range(50)]

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_penalties() -> None:
    # repetition counts the prompt, presence and frequency only the answer.
    assert sampler([1], temperature=0.0, repetition_penalty=2.0).pick(LOGITS.copy()).token == 5
    negative = sampler([0], temperature=0.0, repetition_penalty=2.0)
    assert negative.pick(np.array([-1, -1.5, -9, -9, -9, -9], np.float32)).token == 1
    drawn = sampler([1], temperature=0.0, frequency_penalty=0.3, presence_penalty=0.1)
    assert [drawn.pick(LOGITS.copy()).token for _ in range(4)] == [1, 1, 5, 1]


def test_logit_bias() -> None:
    assert sampler(temperature=0.0, logit_bias={4: 100.0}).pick(LOGITS.copy()).token == 4


def test_min_tokens_and_ignore_eos_hold_stops_back() -> None:
    drawn = sampler(stops=frozenset({1}), temperature=0.0, min_tokens=2)
    assert [drawn.pick(LOGITS.copy()).token for _ in range(3)] == [5, 5, 1]
    drawn = sampler(stops=frozenset({1}), temperature=0.0, ignore_eos=True)
    assert [drawn.pick(LOGITS.copy()).token for _ in range(3)] == [5, 5, 5]


def test_logprobs_are_those_of_the_model() -> None:
    choice = sampler(temperature=0.0, logprobs=2, logit_bias={4: 100.0}).pick(LOGITS.copy())
    assert choice.token == 4
    assert choice.logprob == pytest.approx(math.log(PROBS[4]), abs=1e-6)
    assert [token for token, _ in choice.top] == [1, 5]
    assert choice.top[0][1] == pytest.approx(math.log(PROBS[1]), abs=1e-6)


def test_mask() -> None:
    mask = np.zeros(len(LOGITS), bool)
    mask[3] = True
    assert sampler().pick(LOGITS.copy(), mask).token == 3
