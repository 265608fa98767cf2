"""Times the candidate settings of a backend: a prompt, decode steps of one row, decode steps of eight rows.

All candidates are open at once and take turns, so that a busy moment of the machine hits all of them alike.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edge.backends.base import Backend, Row

# Tokens of the timed prompt: as many as are read in PROMPT_S, within these bounds. Flash attention is often
# faster after a hundred tokens and slower after many.
PROMPT_LEAST, PROMPT_MOST = 64, 512
PROMPT_S = 0.6
PROBE = 32
STREAMS = 8
ROUNDS = 6
PROMPT_ROUNDS = 2
# After so many seconds of prompts, or of decode steps, a slow model gets no further rounds.
ENOUGH_S = (2.0, 4.0)
LEAST_ROUNDS = 2
# Where the least rounds take longer, the machine is too busy, or the model too slow, to measure anything.
BUDGET_S = 20.0
# Weights in the score: one stream, eight streams, prompt. The latency of one reader matters most.
_WEIGHTS = (0.5, 0.3, 0.2)

# Names of fields of a backend's Settings, with the values to try.
Choice = dict[str, Any]
# Opens a backend with a choice, a number of slots, and tokens of context for each slot.
Open = Callable[[Choice, int, int], Backend]
# Seconds of a step of one row, of a step of eight rows, and of one prompt token.
Speed = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Trial:
    """A choice and its times. The shortest of each: other load on the machine only makes a step longer."""

    choice: Choice
    speed: Speed

    def row(self) -> dict[str, Any]:
        """As it is kept on disk."""
        return {**self.choice, **dict(zip(("one", "eight", "prompt"), self.speed, strict=True))}


def scores(speeds: Sequence[Speed], slots: int | None = None) -> list[float]:
    """Weighted time of each, relative to the best of all in each discipline; smaller is better.

    slots: streams that were asked for. One of them is never eight, and eight or more are meant to be used.
    """
    one, eight, prompt = _WEIGHTS
    if slots is not None and (slots == 1 or slots >= STREAMS):
        one, eight = (one + eight, 0.0) if slots == 1 else (0.0, one + eight)
    best = [min(times) for times in zip(*speeds, strict=True)]
    weights = (one, eight, prompt)
    return [sum(w * t / b for w, t, b in zip(weights, times, best, strict=True)) for times in speeds]


class Trials:
    """open_backend: opens what is timed. slots, context: what serving was planned with; fewer may be used.

    layout: the field of a choice that reading one prompt does not depend on; choices that differ in it alone
    share their shortest reading.
    """

    def __init__(self, open_backend: Open, *, slots: int, context: int, layout: str = "") -> None:
        self._open = open_backend
        self._layout = layout
        self._streams = min(STREAMS, slots)
        self._began = time.monotonic()
        self.prompt = self._prompt_length(context)

    def run(self, choices: Sequence[Choice], budget_s: float) -> list[Trial]:
        """Time the choices in turn. Raises TimeoutError `budget_s` seconds after this object was created."""
        until = self._began + budget_s
        room = self.prompt + 2 * ROUNDS + 16
        with contextlib.ExitStack() as stack:
            backends = []
            for choice in choices:
                backends.append(self._open(choice, self._streams, room))
                stack.callback(backends[-1].close)
            token = backends[0].encode("the", special=False)[0]
            prompts = self._prompts(backends, token, until)
            ones, eights = self._decodes(backends, token, until)
        read = [self._reads(choice) for choice in choices]
        least = {
            key: min(min(times) for times, other in zip(prompts, read, strict=True) if other == key)
            for key in read
        }
        return [
            Trial(choice, (min(ones[i]), min(eights[i]), least[read[i]] / self.prompt))
            for i, choice in enumerate(choices)
        ]

    def _reads(self, choice: Choice) -> tuple[tuple[str, Any], ...]:
        """What of a choice reading a prompt depends on."""
        return tuple((name, value) for name, value in choice.items() if name != self._layout)

    def result(self, trials: Sequence[Trial], winner: Trial) -> dict[str, Any]:
        """What is kept on disk."""
        return {
            "trials": [trial.row() for trial in trials],
            "chosen": winner.row(),
            "prompt": self.prompt,
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "seconds": round(time.monotonic() - self._began, 1),
        }

    def _prompt_length(self, context: int) -> int:
        """Tokens to read in each trial, from the time that a short prompt takes."""
        probe = self._open({}, 1, 2 * PROBE)
        try:
            tokens = probe.encode("the", special=False)[:1] * PROBE
            per_token = min(_timed(probe, [Row(0, pos, tokens, 0)]) for pos in (0, PROBE)) / PROBE
        finally:
            probe.close()
        most = min(PROMPT_MOST, context - 2 * ROUNDS)
        return max(min(PROMPT_LEAST, most), min(most, int(PROMPT_S / per_token)))

    def _prompts(self, backends: Sequence[Backend], token: int, until: float) -> list[list[float]]:
        """Seconds of each reading of the prompt, by backend; every stream holds the prompt afterwards."""
        began = time.monotonic()
        seconds: list[list[float]] = [[] for _ in backends]
        for turn in range(PROMPT_ROUNDS):
            if turn and time.monotonic() > began + ENOUGH_S[0]:
                break
            for backend, times in zip(backends, seconds, strict=True):
                if not turn:
                    _check_time(until)
                backend.truncate(0, 0)
                # In chunks, as the engine reads it.
                batch = backend.info.batch
                chunks = [(pos, min(batch, self.prompt - pos)) for pos in range(0, self.prompt, batch)]
                times.append(sum(_timed(backend, [Row(0, pos, [token] * n, 0)]) for pos, n in chunks))
        for backend in backends:
            cells = backend.save(0)
            for slot in range(1, self._streams):
                backend.restore(slot, cells, self.prompt)
        return seconds

    def _decodes(
        self, backends: Sequence[Backend], token: int, until: float
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Seconds of each step of one row, and of each step of all streams, by backend."""
        began = time.monotonic()
        ones: list[list[float]] = [[] for _ in backends]
        eights: list[list[float]] = [[] for _ in backends]
        for turn in range(ROUNDS):
            if turn >= LEAST_ROUNDS and time.monotonic() > min(until, began + ENOUGH_S[1]):
                break
            for i, backend in enumerate(backends):
                if turn < LEAST_ROUNDS:
                    _check_time(until)
                pos = self.prompt + turn
                ones[i].append(_timed(backend, [Row(0, pos + turn, [token], 1)]))
                rows = [Row(0, pos + turn + 1, [token], 1)]
                rows += [Row(slot, pos, [token], 1) for slot in range(1, self._streams)]
                eights[i].append(_timed(backend, rows))
        return ones, eights


def _check_time(until: float) -> None:
    if time.monotonic() > until:
        raise TimeoutError("the machine was too busy to measure, or the model too slow on it")


def _timed(backend: Backend, rows: list[Row]) -> float:
    began = time.perf_counter()
    backend.step(rows)
    return time.perf_counter() - began
