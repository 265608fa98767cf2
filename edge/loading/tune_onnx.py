"""Threads and spinning of onnxruntime, measured with this artefact on this machine.

onnxruntime's threads spin while they wait for work. On a quiet machine that is faster; where the server's own
process or another program wants the core, it is slower. One thread fewer than there are cores may be faster.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from edge.backends.onnx import Model, Onnx, Settings
from edge.loading import tune_results, tune_trials
from edge.machine import hardware


def settings(model: Model, asked: Settings) -> Settings:
    """`asked` with what is fastest here; measured now unless it was before."""
    if asked.device != "cpu" and (asked.device != "auto" or hardware.gpus()):
        # With a GPU the CPU's threads do next to nothing.
        return asked
    return tune_results.tuned(model.path, asked, lambda: measure(model, asked))


def measure(model: Model, asked: Settings) -> dict[str, Any]:
    """Try the combinations; see Trials.result.

    Raises TimeoutError where the machine is too busy, or where the memory does not hold them all at once.
    """
    choices: list[tune_trials.Choice] = [{"threads": asked.threads, "spin": spin} for spin in (True, False)]
    if asked.threads > 2:
        choices.append({"threads": asked.threads - 1, "spin": True})
    if model.header.weights_bytes * 2 * len(choices) > hardware.memory().available:
        raise TimeoutError("the memory does not hold several sessions")

    def open_session(choice: tune_trials.Choice, slots: int, context: int) -> Onnx:
        return Onnx(model, dataclasses.replace(asked, slots=slots, context=context, **choice))

    timing = tune_trials.Trials(open_session, slots=asked.slots, context=asked.context)
    rows = timing.run(choices, tune_trials.BUDGET_S)
    scores = tune_trials.scores([trial.speed for trial in rows])
    return timing.result(rows, rows[scores.index(min(scores))])
