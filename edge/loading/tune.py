"""`edge tune PATH`: what was measured for an artefact on this machine; measures what was not yet."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.artefact import find
from edge.console import plain_table
from edge.errors import EdgeError

if TYPE_CHECKING:
    from edge.backends import llamacpp, onnx

# Heading and text of each choice in the table.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "threads": ("threads", str),
    "flash_attention": ("flash attention", lambda on: "on" if on else "off"),
    "unified": ("KV cache", lambda on: "unified" if on else "per slot"),
    "spin": ("spinning", lambda on: "on" if on else "off"),
}


def main(argv: list[str]) -> int:
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
    # Late: --help and a wrong argument need none of it.
    from edge.loading import load_plan, tune_results
    from edge.machine import hardware

    kinds = (args.backend,) if args.backend else tuple(find.SUFFIXES)
    for artefact in find.candidates(args.path, kinds):
        kv_type = "f16" if artefact.kind == "onnx" else args.kv_type
        options = load_plan.Options(slots=args.slots, threads=args.threads, kv_type=kv_type)
        asked = load_plan.plan(artefact, options).settings
        path = tune_results.kept_path(artefact.path, asked)
        if args.redo or not tune_results.read(path):
            hardware.writable_cache(path.parent.name)  # before minutes of work for a result that is lost
            path.unlink(missing_ok=True)
            note = _measure(artefact.path, asked)
            if not tune_results.read(path):
                raise EdgeError(
                    f"{artefact.path}: nothing was measured ({note})", "stop other programs, then add --redo"
                )
        _show(f"{artefact.name} ({artefact.kind})", tune_results.read(path))
    return 0


def _measure(path: Path, asked: llamacpp.Settings | onnx.Settings) -> str:
    from edge.backends import llamacpp, onnx
    from edge.loading import tune_llamacpp, tune_onnx

    if isinstance(asked, onnx.Settings):
        return tune_onnx.settings(onnx.Model(path), asked).tuned
    model = llamacpp.Model(path, gpu_layers=asked.gpu_layers, extra_buffers=asked.extra_buffers)
    note = tune_llamacpp.settings(model, asked).tuned
    model.close()
    return note


def _show(name: str, result: dict[str, Any]) -> None:
    from rich.console import Console

    from edge.loading.tune_trials import STREAMS

    chosen = result["chosen"]
    columns = {key: column for key, column in _COLUMNS.items() if key in chosen}
    headings = [*(heading for heading, _ in columns.values()), "1 stream", f"{STREAMS} streams", "prompt", ""]
    rows = [
        [
            *(text(row[key]) for key, (_, text) in columns.items()),
            f"{1 / row['one']:.1f} tok/s",
            f"{STREAMS / row['eight']:.1f} tok/s",
            f"{1 / row['prompt']:.0f} tok/s",
            "taken" if all(row[key] == chosen[key] for key in columns) else "",
        ]
        for row in result["trials"]
    ]
    title = f"{name}, measured {result['date']} in {result['seconds']} s"
    Console().print(plain_table(headings, rows, title=title, left=0))
