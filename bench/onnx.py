"""ONNX figures: `python -m bench.onnx RUN_OR_FOLDER [--merged FOLDER]`, one table, one run, interleaved.

The same file, the same threads, the same greedy tokens: our engine over the ONNX backend (no HTTP on either
side) against onnxruntime-genai's own Generator, and against transformers' generate in float32. With eight
streams the Generator gets its best case, eight equal prompts in one batch; "joining and leaving" is what it
cannot do, so it runs until its longest answer ends. The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import genai
from bench.metrics import median, ratio
from bench.probe import noise
from edge import artefact, hardware, planning, tune_onnx
from edge import messages as msg
from edge.backends.onnx import Model, Onnx, Settings
from edge.cli import guarded
from edge.engine import Engine
from edge.errors import EdgeError
from edge.sampling import Params

PROMPT, TOKENS, STREAMS = 85, 64, 8
# Answers of unequal length, as many tokens in all as eight of TOKENS.
UNEQUAL = (16, 32, 48, 64, 64, 80, 96, 112)
PAUSE_S = 0.2
# How much faster than the other it should be.
GOALS = {
    ("decode, 1 stream", "onnxruntime-genai"): 0.97,
    (f"total, {STREAMS} streams, joining and leaving", "onnxruntime-genai"): 1.0,
    ("total, 1 stream", "transformers fp32"): 3.5,
    (f"total, {STREAMS} streams of equal length", "transformers fp32"): 10.0,
}


class Ours:
    """The engine over the backend, driven as its process drives it."""

    name = "edge"

    def __init__(self, found: artefact.Artefact, threads: int | None) -> None:
        options = planning.Options(context=512, slots=STREAMS, threads=threads, device="cpu")
        asked = planning.plan(found, options)
        assert isinstance(asked, Settings)
        model = Model(found.path)
        settings = dataclasses.replace(tune_onnx.settings(model, asked), threads=asked.threads)
        self.settings = settings
        backend = Onnx(model, settings, extra_stop_ids=found.stop_ids)
        self.vocab = backend.info.vocab
        self._events: list[tuple[float, msg.Event]] = []
        # One for all runs: it learns how long steps take.
        self._engine = Engine(backend, self._emit, speculate=False, flush_s=0.0)
        self._key = 0

    def _emit(self, events: list[msg.Event]) -> None:
        now = time.perf_counter()
        self._events += [(now, event) for event in events]

    def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> list[float]:
        """Seconds until each token of the first request, and at last until all have ended."""
        self._events.clear()
        first = self._key
        began = time.perf_counter()
        for prompt, count in zip(prompts, tokens, strict=True):
            params = Params(temperature=0.0, max_tokens=count, ignore_eos=True)
            self._engine.submit(msg.Submit(self._key, prompt, params, reuse=False))
            self._key += 1
        done: list[msg.Done] = []
        while len(done) < len(prompts):
            self._engine.turn()
            done = [event for _, event in self._events if isinstance(event, msg.Done)]
        end = time.perf_counter()
        made = sum(event.completion_tokens for event in done)
        if made != sum(tokens):
            raise EdgeError(f"the engine made {made} tokens, {sum(tokens)} were asked for")
        mine = [
            at
            for at, event in self._events
            if isinstance(event, (msg.Delta, msg.Done)) and event.key == first and event.tokens
        ]
        return [at - began for at in mine] + [end - began]


class Generator:
    """onnxruntime-genai's own loop over the same file."""

    name = "onnxruntime-genai"

    def __init__(self, folder: Path, threads: int) -> None:
        self._loop = genai.Loop(folder, threads)

    def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> list[float]:
        """As Ours.run: one batch, which ends with its longest answer."""
        times = []
        began = time.perf_counter()
        generator = self._loop.generator(prompts, max(tokens))
        for _ in range(max(tokens)):
            generator.generate_next_token()
            generator.get_next_tokens()
            times.append(time.perf_counter() - began)
        return [*times, time.perf_counter() - began]


class Transformers:
    """generate() in float32, one request after the other, as the tutorial's server does."""

    name = "transformers fp32"

    def __init__(self, merged: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, local_files_only=True)

    def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> list[float]:
        """As Ours.run; the times of single tokens are not seen."""
        began = time.perf_counter()
        for prompt, count in zip(prompts, tokens, strict=True):
            ids = self._torch.tensor([prompt])
            with self._torch.inference_mode():
                self._model.generate(
                    input_ids=ids,
                    attention_mask=self._torch.ones_like(ids),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    pad_token_id=0,
                )
        return [time.perf_counter() - began]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.onnx", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a run, a folder with an ONNX model, or a .onnx file")
    parser.add_argument("--merged", type=Path, help="the merged model (default: that of the run)")
    parser.add_argument("--threads", type=int, default=hardware.cpu_threads())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    found = artefact.resolve(args.path, "onnx")
    merged = args.merged or args.path / "merged"
    console = Console(stderr=True)
    before = noise()
    mine = Ours(found, args.threads)
    others: list[Any] = [Generator(found.path.parent, args.threads)]
    if merged.is_dir():
        others.append(Transformers(merged, args.threads))
    else:
        console.print(f"{merged} is not there: transformers is left out")
    cases: dict[str, tuple[tuple[int, ...], Callable[[list[float], tuple[int, ...]], float]]] = {
        "decode, 1 stream": ((TOKENS,), _decode_rate),
        "total, 1 stream": ((TOKENS,), _total_rate),
        f"total, {STREAMS} streams of equal length": ((TOKENS,) * STREAMS, _total_rate),
        f"total, {STREAMS} streams, joining and leaving": (UNEQUAL, _total_rate),
    }
    rates: dict[str, dict[str, list[float]]] = {}
    seed = 0
    for case, (tokens, rate) in cases.items():
        runners = [mine, *others]
        if rate is _decode_rate:
            runners = [one for one in runners if not isinstance(one, Transformers)]
        rates[case] = {one.name: [] for one in runners}
        for turn in range(args.rounds + 1):
            seed += 1
            prompts = (
                np.random.default_rng(seed).integers(100, mine.vocab - 100, (len(tokens), PROMPT)).tolist()
            )
            for one in runners:
                # A slow one is asked less often, in step with the others.
                if isinstance(one, Transformers) and len(tokens) > 1 and turn > 2:
                    continue
                console.print(f"{case}: {one.name}, round {turn} of {args.rounds}")
                time.sleep(PAUSE_S)
                found_rate = rate(one.run(prompts, tokens), tokens)
                # The first round warms all of them.
                rates[case][one.name] += [found_rate] if turn else []
        for row in _rows(case, rates[case]):
            told = f"{row[0]}: edge {row[1]}, {row[3]} {row[2]}: {row[4]}, goal {row[5]}"
            console.print(told, soft_wrap=True)
    table = Table(title=f"{found.path.name}, {args.threads} threads, tokens/s", title_justify="left")
    for heading in ("what", "edge", "other", "", "edge is faster by", "goal"):
        table.add_column(heading)
    for case, by in rates.items():
        for row in _rows(case, by):
            table.add_row(*row)
    Console().print(table)
    for said in (before.warning, noise().warning):
        if said:
            console.print(f"warning: {said}: the machine is noisy, ratios are what counts")
    facts = {
        "model": found.path.name,
        "settings": dataclasses.asdict(mine.settings),
        "machine": hardware.describe(),
        "rates": rates,
    }
    sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
    return 0


def _rows(case: str, by: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """A line of the table for each of the others; rounds that both ran are compared."""
    rows = []
    for name, values in by.items():
        if name == Ours.name:
            continue
        pair = ratio(by[Ours.name][: len(values)], values)
        goal = GOALS.get((case, name))
        shown = f"{pair.value:.2f} x ({pair.low:.2f} to {pair.high:.2f})" if pair else "-"
        mark = "" if goal is None or pair is None else " reached" if pair.value >= goal else " MISSED"
        mine, other = median(by[Ours.name]) or 0.0, median(values) or 0.0
        rows.append((case, f"{mine:.1f}", f"{other:.1f}", name, shown, f"{goal or '-'}{mark}"))
    return rows


def _decode_rate(times: list[float], tokens: tuple[int, ...]) -> float:
    """Tokens a second after the first, which comes out of the prompt."""
    return (len(times) - 2) / (times[-2] - times[0])


def _total_rate(times: list[float], tokens: tuple[int, ...]) -> float:
    """All tokens that were asked for, a second, prompts included."""
    return sum(tokens) / times[-1]


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
