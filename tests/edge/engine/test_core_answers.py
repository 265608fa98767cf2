"""What the engine's answers hold, over every backend: sampling, constraints, speculation."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from typing import Any

import numpy as np
import pytest

from edge.backends.base import Row
from edge.backends.fake import FakeBackend
from edge.engine import sampling
from edge.engine.grammar import Constraint, json_constraint
from edge.engine.request import prompt_tokens
from edge.engine.sampling import Choice, Sampler
from tests.support.backends import Maker, counted, only
from tests.support.desk import Desk

# -- sampling -----------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_whatever_else_runs(make: Maker) -> None:
    def run(others: int) -> list[bytes]:
        desk = Desk(make())
        desk.submit(1, "once", temperature=1.0, seed=7, max_tokens=30, ignore_eos=True, logprobs=0)
        for key in range(2, 2 + others):
            desk.submit(key, f"{key} others", temperature=1.0, seed=key, max_tokens=20, ignore_eos=True)
        desk.run()
        return desk.made(1)

    assert run(0) == run(3)
    desk = Desk(make())
    for seed in (7, 8):
        desk.submit(seed, "once", temperature=1.0, seed=seed, max_tokens=30, ignore_eos=True, logprobs=0)
    desk.run()
    assert desk.made(7) != desk.made(8)


def test_rows_of_a_gpu_are_sampled_side_by_side_to_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(device: str) -> list[list[bytes]]:
        backend = FakeBackend(slots=6)
        backend.info = dataclasses.replace(backend.info, device=device)
        desk = Desk(backend)
        for key in range(9):
            given = {"logprobs": key % 3, "temperature": key % 2, "ignore_eos": key % 4 == 0}
            constraint = Constraint("regex", "[a-z]{12}") if key == 5 else None
            desk.submit(key, f"{key} of many", seed=key, max_tokens=20, constraint=constraint, **given)
        desk.run()
        return [desk.made(key) for key in range(9)]

    want = run("cpu")
    sampled: set[int] = set()
    pick = Sampler.pick

    def watched(self: Sampler, *given: Any) -> Choice:
        sampled.add(threading.get_ident())
        return pick(self, *given)

    monkeypatch.setattr(Sampler, "pick", watched)
    monkeypatch.setattr(sampling, "PARALLEL_FROM", 0)
    assert run("cuda: a GPU") == want
    assert len(sampled) > 2


def test_logprobs_are_those_of_the_backend(make: Maker) -> None:
    backend = make()
    desk = Desk(backend)
    desk.submit(1, "abc", temperature=1.0, seed=1, max_tokens=6, ignore_eos=True, logprobs=3)
    desk.run()
    prompt = prompt_tokens(backend, "abc")
    entries = desk.logprobs(1)
    assert len(entries) == 6
    fresh = make(slots=1)
    logits = fresh.step([Row(0, 0, prompt, 1)])[0].astype(np.float64)
    for at, entry in enumerate(entries):
        want = logits - np.logaddexp.reduce(logits)
        best = np.sort(want)[::-1][:3]
        np.testing.assert_allclose([p for _, p in entry.top], best, atol=2e-3)
        token = next(
            token
            for token in np.flatnonzero(np.abs(want - entry.logprob) < 2e-3)
            if backend.decode(int(token)) == entry.token
        )
        logits = fresh.step([Row(0, len(prompt) + at, [int(token)], 1)])[0].astype(np.float64)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_regex_is_obeyed_beside_free_text(make: Maker, temperature: float) -> None:
    pattern = "(yes|no|[0-9]{3}), 好{1,2}!"
    desk = Desk(make())
    for key in range(3):
        desk.submit(
            key, f"go {key}", temperature=temperature, seed=key, constraint=Constraint("regex", pattern)
        )
    desk.submit(9, "free", temperature=temperature, seed=9, max_tokens=20)
    desk.run()
    for key in range(3):
        assert re.fullmatch(pattern, desk.text(key))
        assert desk.done(key).reason == "stop"


def test_a_json_schema_is_obeyed(make: Maker) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "n": {"type": "integer", "maximum": 9}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    desk = Desk(make(context=256))
    for key in range(4):
        desk.submit(key, f"go {key}", seed=key, constraint=json_constraint(schema, "x"))
    desk.run()
    for key in range(4):
        found = json.loads(desk.text(key))
        assert set(found) == {"name", "n"}
        assert found["n"] <= 9


# -- speculation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "seed": 3}])
def test_speculation_saves_steps_and_keeps_the_text(
    make: Maker, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    def run(speculate: bool) -> tuple[Desk, int]:
        backend = make()
        desk = Desk(backend, speculate=speculate, clock=lambda: 0.0)
        with monkeypatch.context() as patch:
            steps = counted(backend, patch)
            desk.submit(1, "aaaaaaaaaa", max_tokens=60, logprobs=0, logit_bias=only(backend, "a"), **sampling)
            desk.submit(2, "abcabcabc", max_tokens=8, ignore_eos=True, logprobs=0, **sampling)
            desk.run()
        return desk, len(steps)

    (plain, most), (fast, fewer) = run(False), run(True)
    for key in (1, 2):
        assert fast.made(key) == plain.made(key)
    assert fast.text(1) == "a" * 60
    assert fast.done(1).accepted > 20
    assert fewer < most


def test_speculation_saves_most_steps_where_text_repeats() -> None:
    text = "the cat sat on the mat. " * 8

    def run(speculate: bool) -> tuple[Desk, int]:
        backend = FakeBackend(context=512, reply=lambda ids: list(text.encode()))
        desk = Desk(backend, speculate=speculate, clock=lambda: 0.0)
        desk.submit(1, text + "?", temperature=0.0)
        desk.run()
        return desk, len(backend.steps)

    (plain, most), (fast, fewer) = run(False), run(True)
    assert plain.text(1) == fast.text(1) == text
    assert fewer < most / 3
    assert fast.done(1).accepted > 150


@pytest.mark.parametrize("row", [*(pytest.param(row, marks=pytest.mark.slow) for row in (0.02, 0.25)), 0.6])
def test_speculation_is_never_much_slower_and_twice_as_fast_where_rows_are_cheap(row: float) -> None:
    """Seconds of a backend whose steps take 10 ms, and `row` of that for each row more."""

    def seconds(reply: bytes, speculate: bool) -> float:
        now = [0.0]
        backend = FakeBackend(context=1024, reply=lambda _: list(reply))
        step = backend.step

        def slow(rows: list[Row]) -> Any:
            decoded = sum(len(one.tokens) for one in rows if one.outputs)
            now[0] += 0.010 * (1 + row * (decoded - 1)) if rows[0].pos else 0.1
            return step(rows)

        backend.step = slow  # type: ignore[method-assign]
        desk = Desk(backend, speculate=speculate, clock=lambda: now[0])
        desk.submit(1, "the cat sat on the mat?", temperature=0.0, max_tokens=600)
        desk.run()
        assert desk.done(1).completion_tokens >= 400
        return now[0]

    same = b"the cat sat on the mat. " * 25
    # Words come again, what follows them does not.
    words = [b"one ", b"two ", b"three ", b"four ", b"five ", b"six ", b"seven ", b"eight "]
    free = b"".join(words[n] for n in np.random.default_rng(0).integers(0, 8, 110))
    repeated, unlike = (seconds(text, False) / seconds(text, True) for text in (same, free))
    assert unlike > 0.97
    assert repeated > {0.02: 5.0, 0.25: 2.0, 0.6: 1.2}[row]
