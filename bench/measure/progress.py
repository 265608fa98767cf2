"""Progress of a measurement: a live table on a terminal, plain lines elsewhere.

A thread draws it twice a second, which takes less than one percent of a core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edge.console import plain_table
from edge.progress import report

REFRESH_HZ = 2
Case = tuple[str, int]


class View:
    """Follows targets through their rounds, and shows on `console` where they are."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(self, console=console, refresh_per_second=REFRESH_HZ, transient=True)
        self._phase = ""
        self._rounds: dict[Case, int] = {}
        self._names: list[str] = []
        self._expected: dict[tuple[str, Case], float] = {}
        # Seconds and tokens/s of each round that is over.
        self._done: dict[tuple[str, Case], list[tuple[float, float]]] = {}
        self._now: tuple[str, Case] | None = None
        self._began = 0.0
        self._tokens = 0

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, phase: str) -> None:
        """Show what happens between rounds."""
        self._phase, self._now = phase, None
        done = sum(map(len, self._done.values()))
        total = len(self._names) * sum(self._rounds.values())
        report(phase, done, total or None, unit="rounds", seconds_left=self.left() if total else None)
        if not self._console.is_terminal:
            self._console.print(phase, markup=False, highlight=False, soft_wrap=True)

    def expect(
        self, names: Sequence[str], rounds: Mapping[Case, int], seconds: Mapping[tuple[str, Case], float]
    ) -> None:
        """Announce the rounds. seconds: an estimate for one round of each target and case."""
        self._names, self._rounds, self._expected = list(names), dict(rounds), dict(seconds)

    def begin(self, name: str, case: Case) -> None:
        self._began, self._tokens, self._now = time.perf_counter(), 0, (name, case)

    def seen(self, tokens: int) -> None:
        """Count tokens that have come."""
        self._tokens += tokens

    def end(self, rate: float) -> None:
        """The round is over: tokens/s."""
        now, self._now = self._now, None
        assert now is not None
        place = self._place(*now)
        self._done.setdefault(now, []).append((time.perf_counter() - self._began, rate))
        self.say(f"{place}: {rate:.1f} tokens/s; about {_clock(self.left())} left")

    def left(self) -> float:
        """Seconds that the rounds will still take, by those before them, or by the estimate."""
        total = 0.0
        for case, rounds in self._rounds.items():
            for name in self._names:
                took = [seconds for seconds, _ in self._done.get((name, case), [])]
                each = statistics.fmean(took) if took else self._expected.get((name, case), 0.0)
                total += each * (rounds - len(took))
        if self._now is not None:
            total -= time.perf_counter() - self._began
        return max(total, 0.0)

    def __rich__(self) -> RenderableType:
        return Group(self._table(), Text(self._line())) if self._done else Text(self._line())

    def _line(self) -> str:
        # Another thread draws than the one that reports: what it decides by is read once.
        if (now := self._now) is None:
            return self._phase
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rate = f"{self._tokens / seconds:.1f} tokens/s" if self._tokens else "no token yet"
        return f"{self._place(*now)}, {rate}; about {_clock(self.left())} left"

    def _place(self, name: str, case: Case) -> str:
        number = len(self._done.get((name, case), [])) + 1
        return f"{name}: {_case_title(case)}, round {number} of {self._rounds[case]}"

    def _table(self) -> Table:
        rows = []
        for case in self._rounds:
            rates = [[rate for _, rate in self._done.get((name, case), [])] for name in self._names]
            cells = (f"{statistics.median(rounds):.1f} ({len(rounds)})" if rounds else "" for rounds in rates)
            rows.append([_case_title(case), *cells])
        title = "output tokens/s, median of the rounds so far"
        return plain_table(["", *self._names], rows, title=title)


def _case_title(case: Case) -> str:
    return f"{case[0]}, {case[1]} client{'' if case[1] == 1 else 's'}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
