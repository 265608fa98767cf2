"""What the engine's answers hold, over every backend: sampling, constraints, speculation."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from edge.backends.base import Row
from edge.backends.fake import FakeBackend
from edge.grammar import Constraint, json_constraint
from edge.speculate import Lookup
from tests.backends import Maker, counted, only
from tests.desk import Desk

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


def test_logprobs_are_those_of_the_backend(make: Maker) -> None:
    backend = make()
    desk = Desk(backend)
    desk.submit(1, "abc", temperature=1.0, seed=1, max_tokens=6, ignore_eos=True, logprobs=3)
    desk.run()
    prompt = desk.engine.prompt_tokens("abc")
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
        desk = Desk(backend, speculate=speculate)
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
        desk = Desk(backend, speculate=speculate)
        desk.submit(1, text + "?", temperature=0.0)
        desk.run()
        return desk, len(backend.steps)

    (plain, most), (fast, fewer) = run(False), run(True)
    assert plain.text(1) == fast.text(1) == text
    assert fewer < most / 3
    assert fast.done(1).accepted > 150


def test_speculation_pauses_where_it_does_not_pay() -> None:
    lookup = Lookup([1, 2, 3, 9, 1, 2, 3])
    tries = 0
    for _ in range(200):
        draft = lookup.draft(8)
        if draft:
            tries += 1
            lookup.learn(len(draft), 0)
    assert 1 < tries < 12
