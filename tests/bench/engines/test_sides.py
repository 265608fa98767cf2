"""Our engine as a side of a race, two of a kind, and prompts that nobody was asked before."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.engines import sides
from bench.engines.race import Rates
from bench.servers import external
from bench.servers.target import started
from edge.backends.fake import FakeBackend
from edge.errors import EdgeError
from tests.bench.servers.test_target import other


def test_ours_makes_what_was_asked_for_and_fails_otherwise() -> None:
    side = sides.Ours(FakeBackend(slots=3, context=64, step_s=0.001))
    found = side.run([[65] * 5, [66] * 5, [67] * 5], (4, 9, 2))
    assert found.total > 0 and found.decode is not None
    assert side.run([[65] * 5], (6,)).total > 0
    with pytest.raises(EdgeError, match="refused"):
        side.run([[65] * 64], (6,))
    # A context that ends before the answer does.
    with pytest.raises(EdgeError, match="were asked for"):
        side.run([[65] * 60], (60,))


def test_clients_ask_for_answer_after_answer() -> None:
    backend = FakeBackend(slots=4, context=64, step_s=0.001)
    most = 0
    step = backend.step

    def watched(rows: Sequence[Any]) -> Any:
        nonlocal most
        most = max(most, len(rows))
        return step(rows)

    backend.step = watched  # type: ignore[method-assign]
    assert sides.Ours(backend, clients=2).run([[65] * 5] * 7, (4,) * 7).total > 0
    assert most == 2


@pytest.mark.slow
def test_who_asks_is_spread_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "ASKERS", 2)
    spawn = multiprocessing.get_context("spawn")
    with (
        other() as (url, handler),
        started(external.target("x", url), tmp_path / "log") as server,
        ProcessPoolExecutor(2, spawn) as askers,
    ):
        found = sides.Server(server, 3, askers).run([], (4,) * 7)
        assert found.total > 0 and found.asking is not None and found.asking > 0
        # The first one asked whether the server can be forced.
        assert len({body["prompt"] for body in handler.bodies[1:]}) == len(handler.bodies[1:]) == 7
        # Fewer clients than processes.
        assert sides.Server(server, 1, askers).run([], (4,) * 3).total > 0


def test_two_of_a_kind_take_turns_and_both_are_warm() -> None:
    calls: list[str] = []

    class Fake:
        name = "fake"

        def __init__(self, which: str) -> None:
            self._which = which

        def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Rates:
            calls.append(self._which)
            return Rates(float(len(calls)))

    pair = sides.Pair(Fake("a"), Fake("b"))
    found = [pair.run([[1]], (1,)).total for _ in range(4)]
    # The first round, which warms, is one of each; its rate is that of the last.
    assert calls == ["b", "a", "b", "a", "b"]
    assert found == [2.0, 3.0, 4.0, 5.0]
    assert pair.name == "fake"
    # More streams touch memory that fewer did not: both are warmed anew.
    assert pair.run([[1]] * 2, (1, 1)).total == 7.0
    assert calls[5:] == ["b", "a"]


def test_prompts_are_never_asked_twice() -> None:
    jobs = [job for _ in range(2) for job in sides.new_jobs(20, 8)]
    assert len({job.prompt for job in jobs}) == 40 and {job.tokens for job in jobs} == {8}


def test_openvino_is_asked_line_by_line_and_must_make_every_token() -> None:
    child = """
import json, sys
print("a note of the library")
print(json.dumps({"version": "1.2"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    made = [min(count, 9) for count in asked["tokens"]]
    print(json.dumps({"seconds": 2.0, "made": made}), flush=True)
    if asked["prompts"] == [[7]]:
        sys.exit("no such product")
"""
    with sides.OpenVINO([sys.executable, "-c", child]) as side:
        assert side.version == "1.2"
        assert side.run([[1, 2], [3]], (4, 8)).total == 6.0
        with pytest.raises(EdgeError, match=r"made \[9\] tokens, \[10\] were asked for"):
            side.run([[1]], (10,))
        side.run([[7]], (1,))
        with pytest.raises(EdgeError, match=r"(?s)ended with code 1.*no such product"):
            side.run([[1]], (1,))
