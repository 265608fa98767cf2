"""Sides that answer the same prompts in turn, and the table of how much faster the first one is.

A side has a `name` and `run(prompts, tokens)`, which makes tokens[i] greedy tokens after prompts[i] and
returns its rates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from rich.console import Console

from bench.measure.metrics import ratio
from bench.report import grid

PAUSE_S = 0.3
# Of a core, beyond which who asks may be what limits.
_BUSY = 0.8


@dataclass
class Rates:
    """Tokens/s: of all that was asked for, prompts included; while all streams decoded; of reading prompts.

    memory_share: decoding over the most that the memory allows. asking: the share of a core that asking a
    server took, the most of several processes. None where it is not known.
    """

    total: float
    decode: float | None = None
    prefill: float | None = None
    memory_share: float | None = None
    asking: float | None = None


class Side(Protocol):
    name: str

    def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Rates:
        """Make tokens[i] greedy tokens after prompts[i]."""


@dataclass(frozen=True)
class Case:
    """What is asked, and which rate counts: "decode" or "total". The first side is held against the others.

    vocab, prompt: each prompt has `prompt` random tokens of a vocabulary. goals: how many times faster than a
    side the first one should be. limits: rounds of a slow side; an earlier case has warmed it.
    """

    name: str
    tokens: tuple[int, ...]
    rate: str
    sides: Sequence[Side]
    vocab: int
    prompt: int = 100
    goals: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of the table. ratio: how many times faster the first side is. reached: whether the goal is."""

    what: str
    measured: str
    ratio: str = ""
    goal: str = ""
    reached: bool | None = None

    def cells(self) -> list[str]:
        mark = {True: "reached", False: "MISSED", None: ""}[self.reached]
        return [self.what, self.measured, self.ratio, self.goal, mark]


HEADINGS = ("what", "measured", "the first is faster by", "goal", "")


def race(case: Case, *, rounds: int, console: Console, seed: int = 0) -> dict[str, list[Rates]]:
    """Rates of each side's rounds, all sides in turn; the first round warms them and is dropped."""
    rates: dict[str, list[Rates]] = {side.name: [] for side in case.sides}
    for number in range(rounds + 1):
        random = np.random.default_rng((seed, number))
        prompts = random.integers(100, case.vocab - 100, (len(case.tokens), case.prompt)).tolist()
        # Alternate the order: the side that runs second sees an idle GPU and cold caches.
        for side in case.sides if number % 2 else case.sides[::-1]:
            if side.name in case.limits and not 0 < number <= case.limits[side.name]:
                continue
            console.print(f"{case.name}: {side.name}, round {number} of {rounds}")
            time.sleep(PAUSE_S)
            result = side.run(prompts, case.tokens)
            rates[side.name] += [result] if number else []
    return rates


def rows(case: Case, rates: Mapping[str, Sequence[Rates]]) -> list[Row]:
    """A row for each side: its median rates and, from the second on, how much faster the first one is.

    Compared are the rounds that both ran.
    """
    table = []
    first: list[float] | None = None
    for name, results in rates.items():
        values = [getattr(result, case.rate) or 0.0 for result in results]
        first = values if first is None else first
        pair = ratio(first[: len(values)], values) if first is not values else None
        goal = case.goals.get(name)
        table.append(
            Row(
                f"{case.name}: {name}",
                shown(results),
                f"{pair.value:.2f} x ({pair.low:.2f} to {pair.high:.2f})" if pair else "",
                f"{goal:g} x" if goal else "",
                pair.value >= goal if pair and goal else None,
            )
        )
    return table


def shown(results: Sequence[Rates]) -> str:
    """The medians of several rounds in words; what no round measured is left out."""
    words = []
    for name in ("total", "decode", "prefill"):
        values = [value for result in results if (value := getattr(result, name)) is not None]
        words += [f"{name} {statistics.median(values):.1f}"] if values else []
    shares = [result.memory_share for result in results if result.memory_share is not None]
    share = f", {statistics.median(shares):.0%} of what the memory allows" if shares else ""
    asking = statistics.median(result.asking or 0.0 for result in results)
    limit = f" at least: who asked used {asking:.0%} of a core" if asking > _BUSY else ""
    return f"{', '.join(words)} tokens/s{share}{limit}"


def markdown(table: Sequence[Row], about: str) -> str:
    """The table in Markdown, with a line below it."""
    return grid.markdown(HEADINGS, [row.cells() for row in table], left=5) + f"\n{about}\n"


def stream_rates(times: Sequence[Sequence[float]], tokens: Sequence[int], seconds: float) -> Rates:
    """times: when each token of each stream came, in seconds from the start; seconds: until the end."""
    first, last = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    between = sum(first < moment <= last for stream in times for moment in stream)
    return Rates(sum(tokens) / seconds, between / (last - first) if last > first else None)
