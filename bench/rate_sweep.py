"""How many requests a second a server stands: arrivals at random times, faster and faster.

A closed loop slows down with the server it measures; people do not. Requests arrive by a Poisson process at a
rate that grows by half each step, until fewer than nine in ten meet the service objective.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.measure import workloads
from bench.measure.load import open_loop
from bench.measure.metrics import OBJECTIVE, Objective, goodput, median, request_rate, spread, ttft
from bench.rounds import Case, Round
from bench.servers.target import Target, started

GROWTH = 1.5
MOST_STEPS = 6
ENOUGH = 0.9
SEED = 5


def start(rounds: Mapping[Case, Sequence[Round]]) -> float:
    """Half of the requests/s that the closed loop reached with most clients, where a sweep begins."""
    most = max(rounds, key=lambda case: case[1])
    return 0.5 * (median([request_rate(part.samples) for part in rounds[most]]) or 1.0)


def sweep(
    target: Target,
    log: Path,
    *,
    tokens: int,
    start: float,
    objective: Objective = OBJECTIVE,
    seconds: float = 12.0,
) -> list[dict[str, Any]]:
    """Steps of about `seconds` from `start` requests/s on; the last one is the first that misses the goal.

    Each step: rate, requests, goodput (requests/s that met the objective), share of them, and TTFT's spread.
    Raises what `started` raises.
    """
    steps: list[dict[str, Any]] = []
    first = 0
    with started(target, log, watch=False) as server:
        for step in range(MOST_STEPS):
            rate = start * GROWTH**step
            count = max(6, round(rate * seconds))
            jobs = workloads.make(count, tokens, seed=SEED, first=first)
            first += count
            samples = asyncio.run(open_loop(server.url, target.dialect, jobs, rate, seed=SEED + step))
            met, share = goodput(samples, objective)
            firsts = spread([value for sample in samples if (value := ttft(sample)) is not None])
            steps.append({"rate": rate, "requests": count, "goodput": met, "share": share, "ttft_s": firsts})
            if share < ENOUGH:
                break
    return steps
