"""Serving on a CUDA card: our engine beside bare loops and beside transformers, one table, interleaved.

    python -m bench.engines.gpu_serve RUN/gguf RUN/onnx --merged RUN/merged [--report docs/reports/serve-CARD]

A GGUF is compared with a bare llama.cpp loop over it, with all layers on the card; an ONNX folder with
onnxruntime-genai's own Generator, and with our engine when it records nothing; all of them with transformers'
generate in bf16 and in fp32, which answers one request after the other: of 32 it is asked for two. No HTTP on
any side, the same forced number of greedy tokens, no speculation. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.engines import race
from edge.artefact import find, manifest
from edge.backends import onnx
from edge.backends.base import Backend
from edge.console import guarded
from edge.engine.worker import Load, open_backend
from edge.errors import UnavailableError
from edge.loading import load_plan
from edge.machine import hardware

PROMPT, TOKENS, STREAMS = 100, 256, 32
# Answers of unequal length, TOKENS each on the average.
UNEQUAL = tuple(TOKENS // 2 + TOKENS * n // (STREAMS - 1) for n in range(STREAMS))
_PACKAGES = ("edge", "llama-cpp-python", "onnxruntime-gpu", "onnxruntime-genai-cuda", "torch", "transformers")
_KEYS = ("what", "edge", "other", "name", "ratio", "goal")


def _backend(found: find.Artefact, *, record: bool = True) -> Backend:
    """As the server would load it, but for a context of the length that is needed here."""
    options = load_plan.Options(context=512, slots=STREAMS, device="cuda")
    settings = load_plan.plan(found, options).settings
    if isinstance(settings, onnx.Settings):
        settings = dataclasses.replace(settings, cuda_graphs=record)
    backend = open_backend(Load.of(found, settings, tune=True))
    if not backend.info.device.startswith("cuda"):
        raise UnavailableError(f"{found.path} runs on {backend.info.device}: {backend.info.why}")
    return backend


def _other(found: find.Artefact, backend: Backend) -> race.Side:
    if found.kind == "onnx":
        return race.Generator(found.path.parent, hardware.cpu_threads())
    said = backend.info.settings
    return race.Loop(
        found.path,
        gpu=True,
        unified=said["kv"] == "unified",
        flash_attention=said["flash_attention"] == "on",
        threads=int(said["threads"]),
    )


def cases(
    name: str, ours: race.Side, other: race.Side, slow: list[race.Side], plain: list[race.Side]
) -> list[race.Case]:
    """What is measured of one artefact. plain: ours without recordings, where there are any."""
    many = (TOKENS,) * STREAMS
    pair = (ours, other)
    one = 0.97 if other.name == race.Generator.name else 0.95
    made = [
        race.Case(f"{name}: decode, 1 stream", (TOKENS,), "decode", {other.name: one}, (*pair, *plain)),
        race.Case(
            f"{name}: total, 1 stream",
            (TOKENS,),
            "total",
            dict.fromkeys((side.name for side in slow), 10.0),
            (*pair, *slow),
        ),
        race.Case(f"{name}: decode, {STREAMS} streams", many, "decode", {other.name: 1.0}, (*pair, *plain)),
        race.Case(
            f"{name}: total, {STREAMS} streams",
            many,
            "total",
            {**dict.fromkeys((side.name for side in slow), 100.0), other.name: 1.0},
            (*pair, *slow),
        ),
    ]
    if other.name == race.Generator.name:
        made.append(
            race.Case(
                f"{name}: total, {STREAMS} streams, joining and leaving",
                UNEQUAL,
                "total",
                {other.name: 1.0},
                pair,
            )
        )
    return made


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines.gpu_serve", description=__doc__.splitlines()[0]
    )
    parser.add_argument("paths", type=Path, nargs="+", help="GGUF files and folders with an ONNX model")
    parser.add_argument("--merged", type=Path, help="the same model for transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, help="write this path with .json and .md")
    args = parser.parse_args(argv)
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    slow: list[race.Side] = []
    for dtype in ("bfloat16", "float32") if args.merged else ():
        slow.append(race.Transformers(args.merged, dtype=dtype, device="cuda", threads=4, most=2))
    lines: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for path in args.paths:
        found = find.resolve(path)
        backend = _backend(found)
        settings[found.path.name] = {"device": backend.info.device, **backend.info.settings}
        mine = race.Ours(backend)
        plain: list[Backend] = [_backend(found, record=False)] if found.kind == "onnx" else []
        unrecorded: list[race.Side] = [race.Ours(one, "edge, nothing recorded") for one in plain]
        todo = cases(found.path.name, mine, _other(found, backend), slow, unrecorded)
        # What transformers makes does not depend on our artefact.
        slow = []
        rates = race.race(todo, console, prompt=PROMPT, vocab=mine.vocab, rounds=args.rounds, slow_rounds=1)
        samples |= rates
        for case in todo:
            for what, ours, theirs, name, ratio, goal in race.rows(case, rates[case.name]):
                lines.append(
                    {"what": what, "edge": ours, "other": theirs, "name": name, "ratio": ratio, "goal": goal}
                )
        for one in (backend, *plain):
            one.close()
    made = {
        "card": hardware.gpus()[0].name,
        "rounds": args.rounds,
        "prompt": PROMPT,
        "lines": lines,
        "samples": samples,
        "settings": settings,
        "versions": manifest.versions(*_PACKAGES),
    }
    if args.report:
        text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
        args.report.with_suffix(".json").write_text(text, encoding="utf-8")
        args.report.with_suffix(".md").write_text(shown(made), encoding="utf-8")
    sys.stdout.write(shown(made) + "\n" + json.dumps(made, ensure_ascii=False) + "\n")
    return 0


def shown(made: dict[str, Any]) -> str:
    """The figures as a table in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    said = [
        "| tokens/s | edge | other | | edge is faster by (least to most) | goal |",
        "| --- | ---: | ---: | --- | --- | --- |",
    ]
    for line in made["lines"]:
        said.append("| " + " | ".join(str(line[key]) for key in _KEYS) + " |")
    said += [
        "",
        f"{made['card']}; {made['rounds']} rounds, prompts of {made['prompt']} tokens; {versions}",
        "",
    ]
    return "\n".join(said)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
