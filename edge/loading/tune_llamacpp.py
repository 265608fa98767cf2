"""Threads, flash attention and KV cache layout of llama.cpp, measured with this artefact on this machine.

Which is fastest differs from CPU to CPU, by factors. So the first start of an artefact takes a few seconds to
try the combinations; later starts read the kept result.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from edge.backends.llamacpp import LlamaCpp, MemoryFullError, Model, Settings
from edge.loading import tune_results, tune_trials

# Where two layouts are this near, per-slot KV buffers are taken: steps over a unified KV cache get slower
# with all that lies in it, and during the measurement other requests have little in it.
_TIE = 1.1


def settings(model: Model, asked: Settings) -> Settings:
    """`asked` with what is fastest here; measured now unless it was before."""
    return tune_results.tuned(model.path, asked, lambda: measure(model, asked))


def measure(model: Model, asked: Settings) -> dict[str, Any]:
    """Try the combinations; see Trials.result.

    Raises TimeoutError where the machine is too busy, and what creating a context raises.
    """

    def open_context(choice: tune_trials.Choice, slots: int, context: int) -> LlamaCpp:
        return LlamaCpp(
            model,
            dataclasses.replace(asked, slots=slots, context=context, capacity=slots * context, **choice),
        )

    timing = tune_trials.Trials(open_context, slots=asked.slots, context=asked.context, layout="unified")
    # A quantised V cache exists only with flash attention.
    flash = [False, True] if asked.kv_type == "f16" else [True]
    rows = _trials(
        timing,
        [
            {"threads": asked.threads, "flash_attention": on, "unified": unified}
            for on in flash
            for unified in asked.layouts
        ],
    )
    winner = best(rows)
    if asked.threads > 2:
        fewer = {**winner.choice, "threads": asked.threads - 1}
        again = timing.run([winner.choice, fewer], 2 * tune_trials.BUDGET_S)
        rows += again[1:]
        winner = best(again)
    return timing.result(rows, winner)


def _trials(timing: tune_trials.Trials, choices: Sequence[tune_trials.Choice]) -> list[tune_trials.Trial]:
    """All choices side by side; one after another, as far as each fits, where a GPU has no room for all."""
    try:
        return timing.run(choices, tune_trials.BUDGET_S)
    except MemoryFullError as error:
        rows = []
        for number, choice in enumerate(choices, 2):
            with contextlib.suppress(MemoryFullError):
                rows += timing.run([choice], number * tune_trials.BUDGET_S)
        if not rows:
            raise error
        return rows


def best(rows: Sequence[tune_trials.Trial]) -> tune_trials.Trial:
    """The best score; of layouts that are near it, per-slot KV buffers."""
    scored = list(zip(rows, tune_trials.scores([trial.speed for trial in rows]), strict=True))
    limit = _TIE * min(score for _, score in scored)
    near = [pair for pair in scored if pair[1] <= limit]
    return min(near, key=lambda pair: (pair[0].choice["unified"], pair[1]))[0]
