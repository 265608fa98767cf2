"""ONNX figures: `python -m bench.engines.onnx_vs_genai RUN_OR_FOLDER [--merged FOLDER]`, one table, one run, interleaved.

The same file, the same threads, the same greedy tokens: our engine over the ONNX backend (no HTTP on either
side) against onnxruntime-genai's own Generator, both loaded twice, and against transformers' generate in
float32. With eight streams the Generator gets its best case, eight equal prompts in one batch; "joining and
leaving" is what it cannot do, so it runs until its longest answer ends. The last line on standard output is
JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.engines import race
from bench.measure.process_probe import noise
from edge.artefact import find
from edge.backends.onnx import Model, Onnx, Settings
from edge.console import guarded
from edge.loading import load_plan, tune_onnx
from edge.machine import hardware

PROMPT, TOKENS, STREAMS = 85, 64, 8
# Answers of unequal length, as many tokens in all as eight of TOKENS.
UNEQUAL = (16, 32, 48, 64, 64, 80, 96, 112)


def _backend(found: find.Artefact, threads: int) -> tuple[Onnx, Settings]:
    options = load_plan.Options(context=512, slots=STREAMS, threads=threads, device="cpu")
    asked = load_plan.plan(found, options).settings
    assert isinstance(asked, Settings)
    model = Model(found.path)
    settings = dataclasses.replace(tune_onnx.settings(model, asked), threads=asked.threads)
    return Onnx(model, settings, extra_stop_ids=found.stop_ids), settings


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines.onnx_vs_genai", description=__doc__.splitlines()[0]
    )
    parser.add_argument("path", type=Path, help="a run, a folder with an ONNX model, or a .onnx file")
    parser.add_argument("--merged", type=Path, help="the merged model (default: that of the run)")
    parser.add_argument("--threads", type=int, default=hardware.cpu_threads())
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args(argv)
    found = find.resolve(args.path, "onnx")
    merged = args.merged or args.path / "merged"
    console = Console(stderr=True)
    before = noise()
    first, settings = _backend(found, args.threads)
    mine = race.Ours(first)
    # Between ours, so that neither side has the earlier ones.
    others = [race.Generator(found.path.parent, args.threads) for _ in range(2)]
    last, _ = _backend(found, args.threads)
    seen: list[race.Side] = [race.Two(mine, race.Ours(last)), race.Two(*others)]
    sides = list(seen)
    if merged.is_dir():
        sides.append(race.Transformers(merged, dtype="float32", device="cpu", threads=args.threads))
    else:
        console.print(f"{merged} is not there: transformers is left out")
    genai, slow = race.Generator.name, "transformers fp32"
    equal, unequal = (TOKENS,) * STREAMS, UNEQUAL
    cases = [
        race.Case("decode, 1 stream", (TOKENS,), "decode", {genai: 0.97}, tuple(seen)),
        race.Case("total, 1 stream", (TOKENS,), "total", {slow: 3.5}, tuple(sides)),
        race.Case(f"total, {STREAMS} streams of equal length", equal, "total", {slow: 10.0}, tuple(sides)),
        race.Case(
            f"total, {STREAMS} streams, joining and leaving", unequal, "total", {genai: 1.0}, tuple(sides)
        ),
    ]
    rates = race.race(cases, console, prompt=PROMPT, vocab=mine.vocab, rounds=args.rounds, slow_rounds=2)
    table = Table(title=f"{found.path.name}, {args.threads} threads, tokens/s", title_justify="left")
    for heading in ("what", "edge", "other", "", "edge is faster by", "goal"):
        table.add_column(heading)
    for case in cases:
        for row in race.rows(case, rates[case.name]):
            table.add_row(*row)
    Console().print(table)
    for said in (before.warning, noise().warning):
        if said:
            console.print(f"warning: {said}: the machine is noisy, ratios are what counts")
    facts = {
        "model": found.path.name,
        "settings": dataclasses.asdict(settings),
        "machine": hardware.describe(),
        "rates": rates,
    }
    sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
