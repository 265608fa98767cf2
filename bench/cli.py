"""`edge bench RUN`: the tutorial's server and ours, side by side, on the same model; and others, if asked.

All servers are started, and one of them works at a time: baseline, edge, baseline, edge ..., with the same
prompts and the same forced number of greedy tokens. `/health` is asked all the while. Where the memory does
not hold all, they are started in turn. Nothing is compared that did different work.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape

from bench import rate_sweep
from bench.measure import roofline, workloads
from bench.measure.process_probe import noise
from bench.measure.progress import View
from bench.measure.roofline import MOST_PROBED, Footprint
from bench.report import build, html, quality, table
from bench.rounds import Plan, measure
from bench.servers import external, reference_servers
from bench.servers.target import Target, baseline, genai, ours, ours_onnx, static
from edge.artefact import find, manifest
from edge.artefact.gguf_header import GGUFHeader
from edge.artefact.onnx_header import OnnxHeader
from edge.errors import InputError, UsageError
from edge.machine import hardware

QUICK = Plan(tokens=32, rounds=2, budget_s=40.0)
# Tokens a slot must hold: the longest prompt of the workloads, a conversation, and the answer.
PROMPT_ROOM = 1536


def main(argv: list[str]) -> int:
    if argv[:1] == ["compare"]:
        from bench.report import compare

        return compare.main(argv[1:])
    if argv[:1] == ["train"]:
        from bench.training import run as train

        return train.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="edge bench",
        description="Measure RUN against the slow baseline. Also: `edge bench compare A.json B.json`, what "
        "changed between two reports; `edge bench train CONFIG.yaml`, training beside a plain loop.",
    )
    parser.add_argument("run", type=Path, help="a run folder with merged/ and gguf/")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds: under a minute or two")
    parser.add_argument("--tokens", type=int, help="output tokens of every answer")
    parser.add_argument("--clients", help="numbers of clients, such as 1,8")
    parser.add_argument("--workloads", help=f"some of {','.join(workloads.WORKLOADS)} (default: mixed)")
    parser.add_argument(
        "--targets",
        help=f"some of {','.join(TARGETS)} (default: baseline,edge), or NAME=URL[#MODEL] for a server that "
        "runs already and speaks OpenAI's completions, or Ollama's interface where the URL ends with /api",
    )
    parser.add_argument("--sweep", action="store_true", help="how many requests a second each target stands")
    parser.add_argument("--budget", type=float, help="seconds that the rounds may take")
    parser.add_argument("--out", type=Path, help="where the report goes (default: the run folder)")
    args = parser.parse_args(argv)
    base = QUICK if args.quick else Plan()
    tokens = base.tokens if args.tokens is None else args.tokens
    if not 2 <= tokens <= 4096:
        raise UsageError(f"--tokens {tokens} is not within 2..4096")
    clients = workloads.counts(args.clients) if args.clients is not None else base.clients
    if max(clients) > 256:
        raise UsageError(f"--clients {max(clients)} is more than 256")
    plan = dataclasses.replace(
        base,
        tokens=tokens,
        # What was asked for by number is not shortened.
        least=base.least if args.tokens is None else tokens,
        clients=tuple(dict.fromkeys(clients)),
        workloads=names_of(args.workloads, workloads.WORKLOADS, "--workloads", base.workloads),
        targets=base.targets if args.targets is None else target_names(args.targets),
        budget_s=base.budget_s if args.budget is None else args.budget,
        sweep=args.sweep,
    )
    with stopped_by_signals():
        report = run(args.run, plan, out=args.out, command="edge bench " + shlex.join(argv))
    sys.stdout.write(json.dumps(build.headline(report), ensure_ascii=False) + "\n")
    return 0


def names_of(
    words: str | None, choices: Mapping[str, object], option: str, default: tuple[str, ...]
) -> tuple[str, ...]:
    """The comma-separated names, each once. Raises UsageError for one that is none of `choices`."""
    if words is None:
        return default
    names = tuple(dict.fromkeys(name.strip() for name in words.split(",")))
    for name in names:
        if name not in choices:
            raise UsageError(f"{option}: there is no '{name}'", f"there are {', '.join(choices)}")
    return names


def target_names(words: str) -> tuple[str, ...]:
    """The comma-separated targets, as given. Raises UsageError for what is none, or has another's name."""
    targets = tuple(dict.fromkeys(name.strip() for name in words.split(",")))
    for target in targets:
        if "=" in target:
            external.check(target)
        elif target not in TARGETS:
            choices = f"there are {', '.join(TARGETS)}; or give NAME=URL"
            raise UsageError(f"--targets: there is no '{target}'", choices)
    names = [target.partition("=")[0] for target in targets]
    for name in names:
        if names.count(name) > 1 or (f"{name}=" in words and name in TARGETS):
            raise UsageError(f"--targets: the name '{name}' is taken", "give the URL another name")
    hosts = [urlsplit(target.partition("=")[2]).netloc for target in targets if "=" in target]
    if len(hosts) != len(set(hosts)):
        raise UsageError(
            "--targets: two of them are the same server, which would reuse what it read for the other",
            "measure one after the other, with --out for each",
        )
    return targets


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """A termination signal is treated like Ctrl-C, so that every server that was started is stopped."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(folder: Path, plan: Plan, *, out: Path | None = None, command: str = "") -> dict[str, Any]:
    """Measure the run, show the table, write report.json, .md and .html to `out`; returns the report.

    An earlier report there is kept under another name. Raises InputError where the run lacks a part or its
    GGUF is not of its merged model, EdgeError where a server does not start or two of them read different
    prompts.
    """
    began = time.perf_counter()
    artefact = find.resolve(folder, "llamacpp")
    assert isinstance(artefact.header, GGUFHeader)
    targets = [make_target(name, folder, artefact.path, plan) for name in plan.targets]
    stages = list(dict.fromkeys(target.stage for target in targets if target.stage not in ("", "merged")))
    for stage in dict.fromkeys(["gguf", *stages]):
        check_same_model(folder, stage)
    out = out or folder
    console = Console(stderr=True)
    with console.status("measuring how quiet the machine is"):
        before = noise()
        footprints = {target.name: footprint(target, folder, artefact.header) for target in targets}
        probed = {name: model.probed for name, model in footprints.items() if model is not None}
        gpu = roofline.gpu_bandwidth(max(probed.values(), default=MOST_PROBED))
    need = sum(need_bytes(folder, artefact, target) for target in targets) + 2**30
    together = need < hardware.memory().available
    with View(console) as view:
        measured, kept = measure(targets, plan, out / "bench", together=together, view=view, probed=probed)
        sweeps = {}
        for part in measured if kept.sweep else ():
            name = part.target.name
            view.say(f"requests at random times: {name}")
            log, start = out / "bench" / f"{name}-sweep.log", rate_sweep.start(part.rounds)
            sweeps[name] = rate_sweep.sweep(part.target, log, tokens=kept.tokens, start=start)
    report = build.build(
        measured,
        plan=kept,
        asked_tokens=plan.tokens,
        command=command,
        model=describe(folder, artefact, stages),
        noise=(before, noise()),
        gpu=gpu,
        footprints=footprints,
        quality={target.name: quality.of_target(folder, target) for target in targets},
        sweeps=sweeps,
        together=together,
        seconds=time.perf_counter() - began,
    )
    if earlier := table.write(report, html.page(report), out):
        kept_as = escape(str(out / f"report-{earlier}.json"))
        console.print(f"the earlier report is kept as {kept_as}, .md and .html", soft_wrap=True)
    table.show(report, Console())
    return report


def footprint(target: Target, folder: Path, header: GGUFHeader) -> Footprint | None:
    """What the target reads for a token; None where that is not known."""
    if target.stage == "gguf":
        return roofline.of_gguf(header)
    if target.stage == "merged":
        return roofline.of_merged(folder / "merged", header, 2 if target.dtype == "bfloat16" else 4)
    return roofline.of_onnx(onnx_of(folder)[1]) if target.stage == "onnx" else None


def onnx_of(folder: Path) -> tuple[find.Artefact, OnnxHeader]:
    """The run's ONNX model."""
    artefact = find.resolve(folder, "onnx")
    assert isinstance(artefact.header, OnnxHeader)
    return artefact, artefact.header


def make_target(name: str, folder: Path, file: Path, plan: Plan) -> Target:
    """The target behind a name of TARGETS or NAME=URL. Raises what `external.target` raises."""
    if "=" in name:
        return external.target(*external.check(name))
    return TARGETS[name](folder, file, plan)


# Each makes a target over (the run folder, its GGUF, the plan); the first one named is what others are
# compared with.
TARGETS: dict[str, Callable[[Path, Path, Plan], Target]] = {
    "baseline": lambda folder, file, plan: baseline(folder / "merged", "float32"),
    "baseline-bf16": lambda folder, file, plan: baseline(folder / "merged", "bfloat16"),
    "transformers-static": lambda folder, file, plan: static(folder / "merged"),
    "edge": lambda folder, file, plan: ours(folder, "--backend", "llamacpp"),
    "edge-onnx": lambda folder, file, plan: ours_onnx(folder),
    "genai": lambda folder, file, plan: genai(folder / "onnx"),
    "llama-server": lambda folder, file, plan: reference_servers.llama_server(
        file,
        slots=max(plan.clients),
        context=PROMPT_ROOM + plan.tokens,
        threads=hardware.cpu_threads(),
        flash_attention=False,
    ),
    "xllamacpp": lambda folder, file, plan: reference_servers.xllamacpp(
        file,
        slots=max(plan.clients),
        context=PROMPT_ROOM + plan.tokens,
        threads=hardware.cpu_threads(),
    ),
    "llama_cpp.server": lambda folder, file, plan: reference_servers.llama_cpp_server(
        file, context=PROMPT_ROOM + plan.tokens, threads=hardware.cpu_threads()
    ),
}


def check_same_model(folder: Path, stage: str = "gguf") -> None:
    """Raise InputError unless RUN/merged is there and the stage's folder says that it was made from it."""
    digest = manifest.read(folder / "merged").digest
    if digest not in [parent["digest"] for parent in manifest.read(folder / stage).parents]:
        raise InputError(
            f"{folder / stage} was not made from {folder / 'merged'}: the two would not be the same model",
            f"edge export {stage} {shlex.quote(str(folder))} --overwrite",
        )


def merged_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "merged").glob("*.safetensors"))


def need_bytes(folder: Path, artefact: find.Artefact, target: Target) -> int:
    """Memory that a target will take, from its files: the merged 16-bit weights in its dtype, and torch;
    twice the GGUF's weights for the others, cache and buffers included; nothing where it runs already.
    """
    if target.url:
        return 0
    if target.stage != "merged":
        return 2 * artefact.header.weights_bytes
    return merged_bytes(folder) * (1 if target.dtype == "bfloat16" else 2) + 2**30


def describe(folder: Path, artefact: find.Artefact, stages: Sequence[str]) -> dict[str, Any]:
    """The model's files, by stage; sizes in bytes. stages: those whose weights a target reads."""

    def entry(model: find.Artefact, *names: str) -> dict[str, Any]:
        size = sum((model.path.parent / name).stat().st_size for name in {model.path.name, *names})
        return {"digest": model.digest, "file": model.path.name, "bytes": size}

    merged = manifest.read(folder / "merged")
    facts: dict[str, Any] = {
        "run": folder.resolve().name,
        "base_model": merged.base_model,
        "merged": {"digest": merged.digest, "bytes": merged_bytes(folder)},
        "gguf": entry(artefact),
    }
    if "onnx" in stages:
        model, header = onnx_of(folder)
        facts["onnx"] = entry(model, *header.files)
    return facts
