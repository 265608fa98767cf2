"""Half a second of each part; and that a fault is found, kept, and found again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.fuzz import PARTS, http, runner


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_half_a_second_of(name: str, tmp_path: Path) -> None:
    outcome = runner.run(name, PARTS[name], tmp_path, seconds=0.5, seed=1)
    assert outcome.cases and not outcome.faults, outcome.faults


held: list[int] = []


@contextlib.contextmanager
def planted(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Fails for 7, takes too long for 8, and for 9 too much memory (`held`)."""

    def check(number: int) -> None:
        assert number != 7, "seven"
        if number == 8:
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
        elif number == 9:
            held.append(2**27)

    yield lambda rng: rng.randrange(10), check


def test_faults_are_found_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LIMIT_S", 0.02)
    monkeypatch.setattr(runner, "LIMIT_BYTES", 2**26)
    monkeypatch.setattr(runner, "_peak", lambda: sum(held))
    outcome = runner.run("planted", planted, tmp_path, seconds=60.0, seed=0)
    assert outcome.failed == runner.MOST_FAULTS
    kept = {file.read_text(encoding="ascii"): (what, file) for what, file in outcome.faults}
    for number, words in (("7", "seven"), ("8", "s of a core"), ("9", " MiB")):
        what, file = kept[number]
        assert words in what
        with pytest.raises(AssertionError, match=words):
            runner.again(planted, tmp_path, file)


def test_inputs_are_decided_by_the_seed(tmp_path: Path) -> None:
    with PARTS["grammars"](tmp_path) as (draw, _):
        drawn = [[draw(Random(f"x {seed} {n}")) for n in range(20)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_route_that_takes_a_body_has_a_good_one() -> None:
    posts = {path for method, path, _ in http.ROUTES if method == "POST"}
    assert {path for path in posts if path not in http.GOOD and "/v1" + path not in http.GOOD} == {
        "/admin/unload"
    }
    assert set(http.GOOD) <= posts
