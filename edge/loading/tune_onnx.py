"""Threads and spinning of onnxruntime, measured on this machine with this artefact; see edge.loading.tune.

onnxruntime's threads spin while they wait for work. On a quiet machine that is faster; where the server's own
process, or another program, wants the core, it is slower. One core less than there are may be faster, too.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from edge.backends.onnx import Model, Onnx, Settings
from edge.loading import tune
from edge.machine import hardware


@dataclasses.dataclass
class Trial:
    """One combination and what it took: seconds of a step of 1 row, of 8 rows, and a prompt token."""

    threads: int
    spin: bool
    one: float
    eight: float
    prompt: float

    @property
    def times(self) -> tuple[float, float, float]:
        return self.one, self.eight, self.prompt


def settings(model: Model, asked: Settings) -> Settings:
    """`asked` with what measuring found best here; measured now unless it was before."""
    if asked.device != "cpu" and (asked.device != "auto" or hardware.gpus()):
        # On a card the processor's threads do next to nothing.
        return asked
    path = cache(model.path, asked)
    found = tune.keep(path, lambda: measure(model, asked))
    if isinstance(found, str):
        return dataclasses.replace(asked, tuned=found)
    chosen = found["chosen"]
    return dataclasses.replace(
        asked,
        threads=chosen["threads"],
        spin=chosen["spin"],
        tuned=f"measured {found['date']} in {found['seconds']} s",
    )


def measure(model: Model, asked: Settings) -> dict[str, Any]:
    """Try the combinations; the trials and the chosen one.

    Raises TimeoutError past tune.BUDGET_S, or where the memory does not hold them.
    """
    began = time.monotonic()
    combinations = [(asked.threads, True), (asked.threads, False)]
    if asked.threads > 2:
        combinations.append((asked.threads - 1, True))
    if model.header.weights_bytes * 2 * len(combinations) > hardware.memory().available:
        # They are timed in turn, so all of them are in memory at once.
        raise TimeoutError("the memory does not hold several sessions")
    probe = Onnx(model, dataclasses.replace(asked, slots=1, context=2 * tune.PROBE))
    prompt = tune.prompt_length(probe, asked.context)
    trials = _race(model, asked, prompt, combinations, began + tune.BUDGET_S)
    best = (min(t.one for t in trials), min(t.eight for t in trials), min(t.prompt for t in trials))
    winner = min(trials, key=lambda trial: tune.score(trial.times, best))
    return {
        "trials": [dataclasses.asdict(trial) for trial in trials],
        "chosen": dataclasses.asdict(winner),
        "prompt": prompt,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": round(time.monotonic() - began, 1),
    }


def _race(
    model: Model, asked: Settings, prompt: int, combinations: list[tuple[int, bool]], until: float
) -> list[Trial]:
    streams = min(tune.STREAMS, asked.slots)
    sessions = [
        Onnx(
            model,
            dataclasses.replace(
                asked, slots=streams, context=prompt + 2 * tune.ROUNDS + 1, threads=threads, spin=spin
            ),
        )
        for threads, spin in combinations
    ]
    try:
        token = sessions[0].encode("the", special=False)[0]
        prompts, ones, eights = tune.race(sessions, streams, prompt, token, until)
        return [
            Trial(*combination, min(ones[i]), min(eights[i]), min(prompts[i]) / prompt)
            for i, combination in enumerate(combinations)
        ]
    finally:
        for session in sessions:
            session.close()


def cache(path: Path, asked: Settings) -> Path:
    """The file that keeps the result."""
    return tune.kept_at(path, tune.version("onnxruntime"), asked.threads, min(tune.STREAMS, asked.slots))
