"""What is measured, defined once, as pure functions over recorded requests.

All times are seconds on one monotonic clock. The client sees events: one piece of text and the number of
tokens in it. A server that does not stream has one event, its whole answer.

    TTFT   time to first token: from sending the request to the first event that carries text
    ITL    inter-token latency: the gap between two successive events of one answer, as the reader sees it
    TPOT   time per output token without the first: (last event - first event) / tokens after the first event
    E2E    end to end: from sending the request to the end of the answer

Rates are of complete answers, over the wall time from the first request to the last end: output tokens, or in
total with those of the prompts. An answer that stopped early, or failed, is counted apart and never enters a
figure. docs/benchmarks.md has the same definitions.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)


@dataclass
class Sample:
    """One request as the client saw it.

    start, end: seconds on the client's clock; events: (time, tokens) of each piece that carried text.
    wanted: output tokens that were asked for; prompt_tokens, completion_tokens: as the server counted them,
    None where it did not say. error: why there is no whole answer, "" otherwise.
    """

    client: int
    prompt: int
    wanted: int
    start: float
    end: float = 0.0
    events: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str = ""
    status: int = 0
    error: str = ""
    text: str = ""

    @property
    def state(self) -> str:
        """ok, error, or incomplete: a well-formed answer with other than the tokens that were asked for."""
        if self.error:
            return "error"
        return "ok" if self.completion_tokens == self.wanted else "incomplete"

    def record(self) -> dict[str, Any]:
        """The sample for a report: times relative to its start, in seconds."""
        row = asdict(self) | {"state": self.state, "end": round(self.end - self.start, 6)}
        row["events"] = [[round(moment - self.start, 6), tokens] for moment, tokens in self.events]
        return row


def ttft(sample: Sample) -> float | None:
    """Seconds to the first event; None where nothing came."""
    return sample.events[0][0] - sample.start if sample.events else None


def itl(sample: Sample) -> list[float]:
    """Gaps between successive events, seconds; empty for an answer in one piece."""
    times = [moment for moment, _ in sample.events]
    return [after - before for before, after in itertools.pairwise(times)]


def tpot(sample: Sample) -> float | None:
    """Seconds per output token after the first event; None for an answer in one piece."""
    later = sum(tokens for _, tokens in sample.events[1:])
    return (sample.events[-1][0] - sample.events[0][0]) / later if later else None


def e2e(sample: Sample) -> float:
    return sample.end - sample.start


def complete(samples: Iterable[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.state == "ok"]


def wall(samples: Sequence[Sample]) -> float:
    """Seconds from the first request to the last end; infinite for no samples, whose rates are then 0."""
    return max(s.end for s in samples) - min(s.start for s in samples) if samples else math.inf


def token_rate(samples: Sequence[Sample]) -> float:
    """Output tokens of complete answers per second of wall time, over all clients."""
    return sum(s.completion_tokens or 0 for s in complete(samples)) / wall(samples)


def total_rate(samples: Sequence[Sample]) -> float:
    """Prompt and output tokens of complete answers per second of wall time."""
    tokens = sum((s.completion_tokens or 0) + (s.prompt_tokens or 0) for s in complete(samples))
    return tokens / wall(samples)


def request_rate(samples: Sequence[Sample]) -> float:
    """Complete answers per second of wall time."""
    return len(complete(samples)) / wall(samples)


@dataclass(frozen=True)
class Objective:
    """A service objective, seconds: the first token within `ttft`, and `tpot` for each after it."""

    ttft: float
    tpot: float

    def met(self, sample: Sample) -> bool:
        first, each = ttft(sample), tpot(sample)
        return (
            sample.state == "ok" and first is not None and first <= self.ttft and (each or 0.0) <= self.tpot
        )


# What a reader at a screen bears: a first word soon, and then words faster than they are read.
OBJECTIVE = Objective(ttft=2.0, tpot=0.2)


def goodput(samples: Sequence[Sample], objective: Objective) -> tuple[float, float]:
    """(requests per second that met the objective, their share of all requests)."""
    met = sum(objective.met(sample) for sample in samples)
    return met / wall(samples), met / max(len(samples), 1)


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile (0..100) with linear interpolation between ranks; None for no values."""
    return float(np.percentile(values, q)) if len(values) else None


def median(values: Sequence[float]) -> float | None:
    return percentile(values, 50)


def interval(
    values: Sequence[float], q: float = 50.0, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap percentile interval of the q-th percentile (Efron 1979): resample with replacement.

    None for fewer than three values, where resampling says nothing. The same seed gives the same interval.
    """
    if len(values) < 3:
        return None
    data = np.asarray(values, dtype=float)
    # Of many values fewer draws tell as much: the gaps of one run are thousands.
    draws = min(draws, max(200, 1_000_000 // len(data)))
    rows = data[np.random.default_rng(seed).integers(0, len(data), (draws, len(data)))]
    estimates = np.percentile(rows, q, axis=1)
    tail = (1 - confidence) / 2 * 100
    return float(np.percentile(estimates, tail)), float(np.percentile(estimates, 100 - tail))


@dataclass(frozen=True)
class Ratio:
    """How many times better, pair by pair: the geometric mean of the pairs, the smallest and the largest."""

    value: float
    low: float
    high: float
    pairs: int


def ratio(better: Sequence[float | None], worse: Sequence[float | None]) -> Ratio | None:
    """Quotients better[i] / worse[i] of paired measurements; pairs that lack a side are left out.

    The mean is geometric: the ratio of A to B is then one over the ratio of B to A. None without a pair.
    """
    quotients = [b / w for b, w in zip(better, worse, strict=True) if b and w]
    if not quotients:
        return None
    return Ratio(statistics.geometric_mean(quotients), min(quotients), max(quotients), len(quotients))


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """All figures of one closed loop: seconds, rates per second and counts, over complete answers."""
    good = complete(samples)
    return {
        "requests": len(samples),
        "complete": len(good),
        "incomplete": sum(s.state == "incomplete" for s in samples),
        "errors": sum(s.state == "error" for s in samples),
        "tokens_per_s": token_rate(samples),
        "total_tokens_per_s": total_rate(samples),
        "requests_per_s": request_rate(samples),
        "ttft_s": spread([value for s in good if (value := ttft(s)) is not None]),
        "itl_s": spread([gap for s in good for gap in itl(s)]),
        "tpot_s": spread([value for s in good if (value := tpot(s)) is not None]),
        "e2e_s": spread([e2e(s) for s in good]),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """p50, p90, p95, p99, max, the count, and each percentile's 95 % interval; None where there is no value.

    Gaps of one answer depend on each other, so the interval of ITL is narrower than it should be.
    """
    return {
        "n": len(values),
        **{f"p{q}": percentile(values, q) for q in PERCENTILES},
        "max": max(values, default=None),
        "intervals": {f"p{q}": interval(values, q) for q in PERCENTILES},
    }
