"""Engines without HTTP, side by side: what the rates say, and who runs when."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from bench.engines import bare_llamacpp, gpu_serve, race
from bench.engines.race import Case, Ours, Rates
from bench.measure import roofline
from edge.artefact import find
from edge.artefact.gguf_header import read_header
from edge.backends.fake import FakeBackend
from edge.errors import EdgeError
from tests.support import tiny_llama


def test_rates_by_hand() -> None:
    # Two streams, 3 and 2 tokens; both decode from 2 s to 4 s, where three tokens came.
    found = race.rates([[1.0, 3.0, 4.0], [2.0, 4.0]], (3, 2), 5.0)
    assert found == Rates(total=1.0, decode=1.5)
    assert race.rates([[1.0, 1.5, 2.0, 2.5]], (4,), 3.0).decode == 2.0
    assert race.rates([[1.0]], (1,), 3.0).decode is None


def test_ours_makes_what_was_asked_for_and_fails_otherwise() -> None:
    side = Ours(FakeBackend(slots=3, context=64, step_s=0.001))
    found = side.run([[65] * 5, [66] * 5, [67] * 5], (4, 9, 2))
    assert found.total > 0 and found.decode is not None
    assert side.run([[65] * 5], (6,)).total > 0
    with pytest.raises(EdgeError, match="refused"):
        side.run([[65] * 64], (6,))
    # A context that ends before the answer does.
    with pytest.raises(EdgeError, match="were asked for"):
        side.run([[65] * 60], (60,))


class Told:
    """A side that says when it ran, and gives a fixed rate."""

    def __init__(self, name: str, rate: float, ran: list[str]) -> None:
        self.name, self._rate, self._ran = name, rate, ran

    def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> Rates:
        self._ran.append(self.name)
        assert {len(prompt) for prompt in prompts} == {7} and len(prompts) == len(tokens)
        return Rates(self._rate * len(self._ran), self._rate)


class Slow(Told, race.Transformers):
    pass


def test_sides_take_turns_and_the_first_round_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "PAUSE_S", 0.0)
    ran: list[str] = []
    a, b, slow = Told("a", 3.0, ran), Told("b", 2.0, ran), Slow("slow", 1.0, ran)
    one = Case("one", (4,), "decode", {"b": 1.4, "slow": 4.0}, (a, b, slow))
    many = Case("many", (4, 4), "decode", {}, (a, slow))
    said = io.StringIO()
    found = race.race(
        [one, many], Console(file=said, width=200), prompt=7, vocab=500, rounds=2, slow_rounds=1
    )
    assert ran == ["slow", "b", "a", "a", "b", "slow", "slow", "b", "a", "a", "a", "slow", "a"]
    assert found == {
        "one": {"a": [3.0, 3.0], "b": [2.0, 2.0], "slow": [1.0, 1.0]},
        "many": {"a": [3.0, 3.0], "slow": [1.0]},
    }
    rows = race.rows(one, found["one"])
    assert [row[1:] for row in rows] == [
        ("3.0", "2.0", "b", "1.50 x (1.50 to 1.50)", "1.4 reached"),
        ("3.0", "1.0", "slow", "3.00 x (3.00 to 3.00)", "4.0 MISSED"),
    ]
    assert "one: 3.0, b 2.0: 1.50 x" in said.getvalue()


def test_the_cases_of_a_card_name_each_goal() -> None:
    ran: list[str] = []
    ours, bare = Told("edge", 1.0, ran), Told("bare llama.cpp loop", 1.0, ran)
    slow = Told("transformers bf16", 1.0, ran)
    cases = gpu_serve.cases("m.gguf", ours, bare, [slow], [])
    goals = {case.name: case.goals for case in cases}
    assert goals["m.gguf: decode, 1 stream"] == {bare.name: 0.95}
    assert goals["m.gguf: total, 1 stream"] == {slow.name: 10.0}
    assert goals["m.gguf: total, 32 streams"] == {slow.name: 100.0, bare.name: 1.0}
    other = Told(race.Generator.name, 1.0, ran)
    plain = Told("edge, nothing recorded", 1.0, ran)
    cases = gpu_serve.cases("m.onnx", ours, other, [], [plain])
    assert cases[0].goals == {other.name: 0.97}
    assert sum(gpu_serve.UNEQUAL) == pytest.approx(gpu_serve.TOKENS * gpu_serve.STREAMS, rel=0.01)
    assert cases[-1].tokens == gpu_serve.UNEQUAL and cases[-1].goals == {other.name: 1.0}
    made = {
        "lines": [{"what": "w", "edge": "2.0", "other": "1.0", "name": "n", "ratio": "2.00 x", "goal": "-"}],
        "card": "小卡",
        "rounds": 3,
        "prompt": 100,
        "versions": {"edge": "1", "torch": ""},
    }
    assert "| w | 2.0 | 1.0 | n | 2.00 x | - |" in gpu_serve.shown(made)
    assert "小卡; 3 rounds, prompts of 100 tokens; edge 1" in gpu_serve.shown(made)


@pytest.mark.parametrize("part", [0, 8])
def test_the_bare_loop_tells_the_share_of_the_memory_of_one_stream(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """part: tensors of each of several files, all of which are read for a token."""
    pytest.importorskip("llama_cpp")
    tiny_llama.write(tmp_path / "m.gguf", part=part)
    path = find.resolve(tmp_path).path
    footprint = roofline.of_gguf(read_header(tiny_llama.write(tmp_path / "one.gguf")))
    readings = iter([2e9, 4e9])  # before and after: the better one counts
    monkeypatch.setattr(
        roofline, "bandwidth", lambda size, threads, seconds: roofline.Bandwidth(next(readings), 1e9, size, 2)
    )
    settings = [bare_llamacpp.Setting(streams, 256 * streams, 2, True, False) for streams in (1, 2)]
    one, two = bare_llamacpp.sweep(path, settings, prompt=10, new=20, repeats=1)
    most = 4e9 / footprint.per_token(10 + 20 / 2)
    assert one["memory_share"] == pytest.approx(one["decode_tokens_per_s"] / most)
    assert two["decode_tokens_per_s"] > 0 and "memory_share" not in two


def test_two_of_a_kind_take_turns_and_both_are_warm() -> None:
    calls: list[str] = []

    class Fake:
        name = "fake"

        def __init__(self, which: str) -> None:
            self._which = which

        def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> race.Rates:
            calls.append(self._which)
            return race.Rates(float(len(calls)), None)

    both = race.Two(Fake("a"), Fake("b"))
    found = [both.run([[1]], (1,)).total for _ in range(4)]
    # The first round, which warms, is one of each; what is told is what the last of them did.
    assert calls == ["b", "a", "b", "a", "b"]
    assert found == [2.0, 3.0, 4.0, 5.0]
    assert both.name == "fake"
    # More streams touch memory that fewer did not: both are warmed anew.
    assert both.run([[1]] * 2, (1, 1)).total == 7.0
    assert calls[5:] == ["b", "a"]
