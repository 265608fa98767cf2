"""Measures a run's servers side by side, and writes the report: what `edge bench RUN` does."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bench import rate_sweep
from bench.measure import roofline
from bench.measure.process_probe import noise
from bench.measure.progress import View
from bench.measure.workloads import Plan
from bench.report import build, html, quality, table
from bench.rounds import measure
from bench.servers import external, reference_servers
from bench.servers.target import Target, baseline, genai, ours, ours_onnx, static
from edge.artefact import find, manifest
from edge.artefact.gguf_header import GGUFHeader
from edge.artefact.onnx_header import OnnxHeader
from edge.errors import InputError
from edge.machine import hardware
from edge.progress import phase

# Tokens a slot must hold: the longest prompt of the workloads, a conversation, and the answer.
PROMPT_ROOM = 1536


def run(folder: Path, plan: Plan, *, out: Path | None = None, command: str = "") -> dict[str, Any]:
    """Measure the run, show the table, write report.json, .md and .html to `out`; returns the report.

    An earlier report there is kept under another name. Raises InputError where the run lacks a part or its
    GGUF is not of its merged model, EdgeError where a server does not start or two of them read different
    prompts.
    """
    began = time.perf_counter()
    artefact = find.resolve(folder, "llamacpp")
    assert isinstance(artefact.header, GGUFHeader)
    chosen = [make_target(name, folder, artefact.path, plan) for name in plan.targets]
    stages = list(dict.fromkeys(target.stage for target in chosen if target.stage not in ("", "merged")))
    for stage in dict.fromkeys(["gguf", *stages]):
        check_same_model(folder, stage)
    out = out or folder
    console = Console(stderr=True)
    with phase(console, "measuring how quiet the machine is"):
        before = noise()
        footprints = {target.name: footprint(target, folder, artefact.header) for target in chosen}
        probed = {name: model.probed for name, model in footprints.items() if model is not None}
        gpu = roofline.gpu_bandwidth(max(probed.values(), default=roofline.MOST_PROBED))
    need = sum(need_bytes(folder, artefact, target) for target in chosen) + 2**30
    together = need < hardware.memory().available
    with View(console) as view:
        measured, kept = measure(chosen, plan, out / "bench", together=together, view=view, probed=probed)
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
        quality={target.name: quality.of_target(folder, target) for target in chosen},
        sweeps=sweeps,
        together=together,
        seconds=time.perf_counter() - began,
    )
    if earlier := table.write(report, html.page(report), out):
        kept_as = escape(str(out / f"report-{earlier}.json"))
        console.print(f"the earlier report is kept as {kept_as}, .md and .html", soft_wrap=True)
    table.show(report, Console())
    return report


def footprint(target: Target, folder: Path, header: GGUFHeader) -> roofline.Footprint | None:
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


def targets(folder: Path, file: Path, plan: Plan) -> dict[str, Callable[[], Target]]:
    """What makes each target, by name. file: the run's GGUF."""
    slots, threads, context = max(plan.clients), hardware.cpu_threads(), PROMPT_ROOM + plan.tokens
    merged = folder / "merged"
    return {
        "baseline": lambda: baseline(merged, "float32"),
        "baseline-bf16": lambda: baseline(merged, "bfloat16"),
        "transformers-static": lambda: static(merged),
        "edge": lambda: ours(folder, "--backend", "llamacpp"),
        "edge-onnx": lambda: ours_onnx(folder),
        "genai": lambda: genai(folder / "onnx"),
        "llama-server": lambda: reference_servers.llama_server(
            file, slots=slots, context=context, threads=threads, flash_attention=False
        ),
        "xllamacpp": lambda: reference_servers.xllamacpp(file, slots=slots, context=context, threads=threads),
        "llama_cpp.server": lambda: reference_servers.llama_cpp_server(
            file, context=context, threads=threads
        ),
    }


def make_target(name: str, folder: Path, file: Path, plan: Plan) -> Target:
    """The target behind a name or NAME=URL. Raises what `external.target` raises."""
    known, _, url = name.partition("=")
    return external.target(known, url) if url else targets(folder, file, plan)[name]()


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
