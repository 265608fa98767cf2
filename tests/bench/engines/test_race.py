"""Sides in turn: what the rates mean, who runs when, and the rows of the table."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from bench.engines import race
from bench.engines.race import Case, Rates, Row


def test_rates_by_hand() -> None:
    # Two streams, 3 and 2 tokens; both decode from 2 s to 4 s, where three tokens came.
    found = race.stream_rates([[1.0, 3.0, 4.0], [2.0, 4.0]], (3, 2), 5.0)
    assert found == Rates(total=1.0, decode=1.5)
    assert race.stream_rates([[1.0, 1.5, 2.0, 2.5]], (4,), 3.0).decode == 2.0
    assert race.stream_rates([[1.0]], (1,), 3.0).decode is None


class Told:
    """A side that notes when it ran, and has a fixed rate."""

    def __init__(self, name: str, rate: float, ran: list[str]) -> None:
        self.name, self._rate, self._ran = name, rate, ran

    def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Rates:
        self._ran.append(self.name)
        assert {len(prompt) for prompt in prompts} == {7} and len(prompts) == len(tokens)
        assert all(100 <= token < 400 for prompt in prompts for token in prompt)
        return Rates(self._rate * len(self._ran), self._rate)


def test_sides_take_turns_and_the_first_round_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "PAUSE_S", 0.0)
    ran: list[str] = []
    a, b, slow = Told("a", 3.0, ran), Told("b", 2.0, ran), Told("slow", 1.0, ran)
    one = Case("one", (4,), "decode", (a, b, slow), 500, prompt=7, goals={"b": 1.4, "slow": 4.0})
    many = Case("many", (4, 4), "decode", (a, slow), 500, prompt=7, limits={"slow": 1})
    progress = io.StringIO()
    console = Console(file=progress, width=200)
    rates = [race.race(case, rounds=2, console=console) for case in (one, many)]
    assert ran == ["slow", "b", "a", "a", "b", "slow", "slow", "b", "a", "a", "a", "slow", "a"]
    decode = [{name: [r.decode for r in results] for name, results in each.items()} for each in rates]
    assert decode == [
        {"a": [3.0, 3.0], "b": [2.0, 2.0], "slow": [1.0, 1.0]},
        {"a": [3.0, 3.0], "slow": [1.0]},
    ]
    assert [row.cells()[2:] for row in race.rows(one, rates[0])] == [
        ["", "", ""],
        ["1.50 x (1.50 to 1.50)", "1.4 x", "reached"],
        ["3.00 x (3.00 to 3.00)", "4 x", "MISSED"],
    ]
    assert race.rows(many, rates[1])[1].ratio == "3.00 x (3.00 to 3.00)"
    assert "one: slow, round 2 of 2" in progress.getvalue()


def test_the_row_of_a_side_has_all_its_rates() -> None:
    results = [Rates(10.0, 20.0, 300.0, 0.4), Rates(12.0, 22.0, 320.0, 0.5)]
    assert (
        race.shown(results)
        == "total 11.0, decode 21.0, prefill 310.0 tokens/s, 45% of what the memory allows"
    )
    assert race.shown([Rates(10.0)]) == "total 10.0 tokens/s"
    assert race.shown([Rates(10.0, asking=0.5)]) == "total 10.0 tokens/s"
    busy = race.shown([Rates(10.0, asking=0.97)])
    assert busy == "total 10.0 tokens/s at least: who asked used 97% of a core"
    [only] = race.rows(Case("c", (1,), "total", (), 500), {"edge": [Rates(10.0)]})
    assert only == Row("c: edge", "total 10.0 tokens/s")
    text = race.markdown([Row("what", "value", "2.00 x", "1.5 x", True)], "小卡; 3 rounds")
    assert "| what | value | 2.00 x | 1.5 x | reached |" in text and text.endswith("\n小卡; 3 rounds\n")
