"""Threads, flash attention and KV layout, measured on this machine with this artefact; `edge tune PATH`.

What is best differs from CPU to CPU, by factors. So the first start of an artefact takes a few seconds to
try the combinations, interleaved, at one and at eight streams and over a prompt, and keeps the result in the
user's cache, keyed by artefact, build, CPU and what was asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge.artefact.find import Artefact
from edge.backends import onnx
from edge.backends.base import Backend, Row
from edge.backends.llamacpp import LlamaCpp, Model, Settings
from edge.errors import EdgeError
from edge.machine import build_llamacpp, hardware

# Tokens of the prompt: as many as take PROMPT_S to read, within these bounds. Flash attention is often the
# faster one after a hundred tokens and the slower one after many.
PROMPT_LEAST, PROMPT_MOST = 128, 512
PROMPT_S = 1.2
PROBE = 32
STREAMS = 8
ROUNDS = 8
PROMPT_ROUNDS = 2
# Past these many seconds a large model is not asked for more rounds of prompts, or of steps after the third.
ENOUGH_S = (3.0, 8.0)
LEAST_ROUNDS = 3
# A machine on which this is not enough is too busy to measure anything.
BUDGET_S = 20.0
# Where two layouts are this near, a part for each slot is taken: a pool's steps grow with all that lies in
# it, other streams' texts and what is kept of earlier ones, of which there is little while this is measured.
_TIE = 1.1
# Weights of one stream, eight streams and prompt in the score: latency for one reader is the main thing.
_WEIGHTS = (0.5, 0.3, 0.2)


@dataclasses.dataclass
class Trial:
    """One combination and what it took: seconds of a step of 1 row, of 8 rows, and a prompt token."""

    threads: int
    flash_attention: bool
    unified: bool
    one: float
    eight: float
    prompt: float

    @property
    def times(self) -> tuple[float, float, float]:
        return self.one, self.eight, self.prompt


def score(times: tuple[float, float, float], best: tuple[float, float, float]) -> float:
    """Weighted time relative to the best seen in each discipline; smaller is better."""
    return sum(w * t / b for w, t, b in zip(_WEIGHTS, times, best, strict=True))


def settings(model: Model, asked: Settings) -> Settings:
    """`asked` with what measuring found best here; measured now unless it was before."""
    found = keep(_cache(model.path, asked), lambda: measure(model, asked))
    if isinstance(found, str):
        return dataclasses.replace(asked, tuned=found)
    chosen = found["chosen"]
    return dataclasses.replace(
        asked,
        threads=chosen["threads"],
        threads_batch=chosen["threads"],
        flash_attention=chosen["flash_attention"],
        unified=chosen["unified"],
        tuned=f"measured {found['date']} in {found['seconds']} s",
    )


def keep(path: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    """What `path` keeps, measured now by `run` unless it was before; or why there is nothing."""
    found = read(path)
    if found.get("state") == "measuring":
        # The process died while it measured: serve with what is asked for rather than die again.
        return "skipped: the last attempt did not end"
    if found.get("state") != "measured":
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, {"state": "measuring"})
        try:
            found = {"state": "measured", **run()}
        except TimeoutError as error:
            return f"skipped: {error}"
        finally:
            path.unlink(missing_ok=True)
        _write(path, found)
    return found


def measure(model: Model, asked: Settings) -> dict[str, Any]:
    """Try the combinations; the trials and the chosen one.

    Raises TimeoutError past BUDGET_S, and what making a context raises.
    """
    began = time.monotonic()
    probe = LlamaCpp(model, dataclasses.replace(asked, slots=1, context=2 * PROBE, capacity=2 * PROBE))
    prompt = prompt_length(probe, asked.context)
    layouts = [(asked.threads, flash, unified) for flash in _flash(asked) for unified in _unified(asked)]
    trials = _race(model, asked, prompt, layouts, began + BUDGET_S)
    winner = _best(trials)
    if asked.threads > 2:
        fewer = (asked.threads - 1, winner.flash_attention, winner.unified)
        same = (asked.threads, winner.flash_attention, winner.unified)
        again = _race(model, asked, prompt, [same, fewer], began + 2 * BUDGET_S)
        trials += again[1:]
        winner = _best(again)
    return {
        "trials": [dataclasses.asdict(trial) for trial in trials],
        "chosen": dataclasses.asdict(winner),
        "prompt": prompt,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": round(time.monotonic() - began, 1),
    }


def prompt_length(probe: Backend, room: int) -> int:
    """How many tokens to read in each trial, from the time that a short prompt takes on `probe`; closes it.

    room: tokens that a slot may hold.
    """
    try:
        token = probe.encode("the", special=False)[0]
        per_token = min(_timed(probe, [Row(0, at, [token] * PROBE, 0)]) for at in (0, PROBE)) / PROBE
    finally:
        probe.close()
    most = min(PROMPT_MOST, room - 2 * ROUNDS)
    return max(min(PROMPT_LEAST, most), min(most, int(PROMPT_S / per_token)))


def _flash(asked: Settings) -> list[bool]:
    # A quantised V cache exists only with flash attention.
    return [True] if asked.kv_type != "f16" else [False, True]


def _unified(asked: Settings) -> list[bool]:
    return [True, False] if asked.parts else [True]


def _best(trials: list[Trial]) -> Trial:
    best = (min(t.one for t in trials), min(t.eight for t in trials), min(t.prompt for t in trials))
    scores = [score(trial.times, best) for trial in trials]
    near = [t for t, its in zip(trials, scores, strict=True) if its <= _TIE * min(scores)]
    return min(near, key=lambda trial: (trial.unified, score(trial.times, best)))


def _race(
    model: Model, asked: Settings, prompt: int, combinations: list[tuple[int, bool, bool]], until: float
) -> list[Trial]:
    """Time the combinations in turn, round by round, so that a busy moment hits all of them alike."""
    streams = min(STREAMS, asked.slots)
    each = prompt + 2 * ROUNDS + 16
    contexts = [
        LlamaCpp(
            model,
            dataclasses.replace(
                asked,
                slots=streams,
                context=each,
                capacity=STREAMS * each,
                threads=threads,
                threads_batch=threads,
                flash_attention=flash,
                unified=unified,
            ),
        )
        for threads, flash, unified in combinations
    ]
    try:
        token = contexts[0].encode("the", special=False)[0]
        prompts, ones, eights = race(contexts, streams, prompt, token, until)
        # The shortest: whatever else runs on the machine can only make a step longer.
        return [
            Trial(*combination, min(ones[i]), min(eights[i]), min(prompts[i]) / prompt)
            for i, combination in enumerate(combinations)
        ]
    finally:
        for context in contexts:
            context.close()


def race(
    contexts: Sequence[Backend], streams: int, prompt: int, token: int, until: float
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Seconds of prompts, of steps of one row and of `streams` rows, by context, timed in turn.

    Raises TimeoutError past `until` on time.monotonic().
    """
    began = time.monotonic()
    prompts: list[list[float]] = [[] for _ in contexts]
    for turn in range(PROMPT_ROUNDS):
        if turn and time.monotonic() > began + ENOUGH_S[0]:
            break
        for i, context in enumerate(contexts):
            _check_time(until)
            context.truncate(0, 0)
            prompts[i].append(_read_prompt(context, [token] * prompt))
    for context in contexts:
        cells = context.save(0)
        for slot in range(1, streams):
            context.restore(slot, cells, prompt)
    ones: list[list[float]] = [[] for _ in contexts]
    eights: list[list[float]] = [[] for _ in contexts]
    for turn in range(ROUNDS):
        if turn >= LEAST_ROUNDS and time.monotonic() > began + ENOUGH_S[1]:
            break
        for i, context in enumerate(contexts):
            _check_time(until)
            at = prompt + turn
            ones[i].append(_timed(context, [Row(0, at + turn, [token], 1)]))
            rows = [Row(0, at + turn + 1, [token], 1)]
            rows += [Row(slot, at, [token], 1) for slot in range(1, streams)]
            eights[i].append(_timed(context, rows))
    return prompts, ones, eights


def _check_time(until: float) -> None:
    if time.monotonic() > until:
        raise TimeoutError("the machine was too busy to measure")


def _read_prompt(context: Backend, tokens: list[int]) -> float:
    """Seconds to read a prompt, in the chunks that the engine would use."""
    batch = context.info.batch
    starts = range(0, len(tokens), batch)
    return sum(_timed(context, [Row(0, at, tokens[at : at + batch], 0)]) for at in starts)


def _timed(context: Backend, rows: list[Row]) -> float:
    began = time.perf_counter()
    context.step(rows)
    return time.perf_counter() - began


def kept_at(path: Path, *facts: Any) -> Path:
    """The file that keeps what was measured of the artefact at `path`. facts: what else it depends on."""
    stat = path.stat()
    key = [path.name, stat.st_size, stat.st_mtime_ns, hardware.cpu_model(), *facts]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8")).hexdigest()[:24]
    return hardware.cache_dir() / "tune" / f"{digest}.json"


def _cache(path: Path, asked: Settings) -> Path:
    return kept_at(
        path,
        build_llamacpp.build_info(),
        asked.threads,
        min(STREAMS, asked.slots),
        _unified(asked),
        asked.kv_type,
        asked.gpu_layers,
        asked.extra_buffers,
    )


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def version(package: str) -> str:
    """The installed version of a package, or ""."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def place(found: Artefact, asked: Settings | onnx.Settings) -> Path:
    """The file that keeps what was measured of an artefact that is loaded as `asked`."""
    if isinstance(asked, onnx.Settings):
        from edge.loading import tune_onnx

        return tune_onnx.cache(found.path, asked)
    return _cache(found.path, asked)


def speed(found: Artefact, asked: Settings | onnx.Settings) -> tuple[float, float, float] | None:
    """Seconds of a step of one row, of eight rows and of a prompt token; None where nothing was measured."""
    kept = read(place(found, asked))
    if kept.get("state") != "measured":
        return None
    chosen = kept["chosen"]
    return chosen["one"], chosen["eight"], chosen["prompt"]


def main(argv: list[str]) -> int:
    from edge.artefact import find
    from edge.loading import load_plan

    parser = argparse.ArgumentParser(
        prog="edge tune", description="Show what was measured for an artefact on this machine."
    )
    parser.add_argument("path", type=Path, help="a run, a folder with a model, or a .gguf or .onnx file")
    parser.add_argument("--backend", choices=list(find.SUFFIXES), help="default: every one there is")
    parser.add_argument("--redo", action="store_true", help="measure again")
    parser.add_argument("--slots", type=int, help="as in edge serve")
    parser.add_argument("--threads", type=int, help="as in edge serve")
    parser.add_argument("--kv-type", choices=["f16", "q8_0", "q4_0"], default="f16")
    args = parser.parse_args(argv)
    kinds = (args.backend,) if args.backend else tuple(find.SUFFIXES)
    for found in find.candidates(args.path, kinds):
        kv_type = "f16" if found.kind == "onnx" else args.kv_type
        options = load_plan.Options(slots=args.slots, threads=args.threads, kv_type=kv_type)
        asked = load_plan.plan(found, options)
        path = place(found, asked)
        if args.redo or read(path).get("state") != "measured":
            path.unlink(missing_ok=True)
            said = _measure(found, asked)
            if read(path).get("state") != "measured":
                raise EdgeError(f"nothing was measured ({said})", "close what else computes, then --redo")
        _show(f"{found.name} ({found.kind})", read(path))
    return 0


def _measure(found: Artefact, asked: Settings | onnx.Settings) -> str:
    if isinstance(asked, onnx.Settings):
        from edge.loading import tune_onnx

        return tune_onnx.settings(onnx.Model(found.path), asked).tuned
    model = Model(found.path, gpu_layers=asked.gpu_layers, extra_buffers=asked.extra_buffers)
    said = settings(model, asked).tuned
    model.close()
    return said


# How a combination is shown: the heading of each of its choices, and their values in words.
_SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "threads": ("threads", str),
    "flash_attention": ("flash attention", lambda on: "on" if on else "off"),
    "unified": ("KV", lambda on: "one pool" if on else "by slot"),
    "spin": ("spinning", lambda on: "on" if on else "off"),
}


def _show(name: str, found: dict[str, Any]) -> None:
    table = Table(title=f"{name}, measured {found['date']} in {found['seconds']} s", title_justify="left")
    choices = [key for key in _SHOWN if key in found["chosen"]]
    headings = [_SHOWN[key][0] for key in choices]
    for heading in (*headings, "1 stream", f"{STREAMS} streams", "prompt", ""):
        table.add_column(heading, justify="right")
    for row in found["trials"]:
        taken = all(row[key] == found["chosen"][key] for key in choices)
        table.add_row(
            *(_SHOWN[key][1](row[key]) for key in choices),
            f"{1 / row['one']:.1f} tok/s",
            f"{STREAMS / row['eight']:.1f} tok/s",
            f"{1 / row['prompt']:.0f} tok/s",
            "taken" if taken else "",
        )
    Console().print(table)
