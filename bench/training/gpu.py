"""QLoRA on a CUDA GPU: speed and memory of ours beside a plain loop of peft and bitsandbytes.

    python -m bench.training.gpu make FOLDER --shape 1.5B           random weights of Qwen2's shape
    python -m bench.training.gpu run FOLDER --batches 1x1024,4x1024 [--rounds 2] [--cap 4.0] [--report X.json]
    torchrun --nproc-per-node 2 -m bench.training.gpu side edge FOLDER --batches 4x1024

Both sides train rank 16 on all linear layers over NF4 with double quantisation, with checkpointing and paged
AdamW in 8 bits, computing in bf16, on the same random rows, every token of which is learnt. Each round gives
each side a process of its own, which takes all batches in turn. Tokens/s are those of the steps after the
first few, which set up and capture CUDA graphs; peaks are those of all steps. --cap: GB of the GPU's memory
that a process may use. Under torchrun each process takes its share of a step's batches: compare with one
process and as large an --accumulate. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
from array import array
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.report import grid
from bench.training.side import SIDES, Course, estimate, in_turn, load, train
from convert.config import TrainConfig, parse
from edge.artefact import manifest
from edge.console import guarded
from edge.machine import hardware

# Of Qwen2: hidden size, intermediate size, layers, attention heads, key/value heads.
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "7B": (3584, 18944, 28, 28, 4),
}
VOCABULARY = 151936
WARM, STEPS = 4, 12
_PACKAGES = ("edge", "torch", "transformers", "peft", "bitsandbytes")


def make(folder: Path, shape: str) -> None:
    """Random weights in Qwen2's shape, with head and embeddings apart as in DeepSeek's distills."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def settings(base: Path, batch: int, accumulate: int = 1) -> TrainConfig:
    """The configuration of both sides."""
    return parse(
        {
            "model_name_or_path": str(base), "template": "qwen", "dataset": "random", "output_dir": "run",
            "quantization_bit": 4, "lora_rank": 16, "lora_target": "all", "optim": "paged_adamw_8bit",
            "bf16": True, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "disable_shuffling": True,
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate,
            "max_steps": WARM + STEPS, "disable_gradient_checkpointing": False,
        }
    )  # fmt: skip


def rows(count: int, length: int) -> list[Any]:
    """Random rows for all steps of `count` rows each."""
    from convert.data.encode import Sample

    draw = random.Random(0)
    return [
        Sample(f"row {n}", array("l", draw.choices(range(VOCABULARY), k=length)), ((1, length),), row=n)
        for n in range(count * (WARM + STEPS))
    ]


def measure(side: str, base: Path, batches: str, *, cap: float, accumulate: int) -> list[dict[str, Any]]:
    """What one side makes of each batch: tokens/s, peaks in GiB, the losses, and for ours the estimate.

    batches: such as 1x1024,4x1024. cap: GB of the GPU's memory that the process may use, 0 for all.
    """
    import torch

    from convert.data.prepare import Prepared
    from convert.train import distributed, finetune
    from convert.train.load_model import choose_place

    world = distributed.join(cpu=False)
    if cap:
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / torch.cuda.mem_get_info()[1])
    console = Console(stderr=True)
    config = settings(base, 1, accumulate)
    # Neither a chat format nor a report: the rows are random.
    nothing: Any = None
    run = finetune.Run(config, base, nothing, nothing, choose_place(config), world, None, console, "")
    results = []
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as folder:
        for words in batches.split(","):
            batch, length = map(int, words.split("x"))
            in_step = batch * accumulate * world.size
            run.config = dataclasses.replace(
                config, per_device_train_batch_size=batch, output_dir=str(Path(folder) / words)
            )
            run.data = Prepared(train=rows(in_step, length), held=[], report=nothing)
            if run.model is None:
                load(side, run)
            course = Course()
            train(side, run, course)
            seconds = course.step_seconds()
            guess = {"estimate_gib": estimate(run) / 2**30} if side == "edge" else {}
            result = {
                "batch": batch,
                "length": length,
                "in_step": in_step,
                "tokens_per_s": in_step * length / statistics.median(seconds[WARM:]),
                "setting_up_s": sum(seconds[:WARM]),
                "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
                "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
                "losses": course.losses,
            }
            results.append(result | guess)
    distributed.leave()
    return results if world.first else []


def compare(base: Path, sizes: str, rounds: int, *, cap: float, sides: list[str]) -> dict[str, Any]:
    """All rounds of the sides in turn, and a line for each batch and side."""
    results: dict[str, list[Any]] = {side: [] for side in sides}

    def words(side: str) -> list[str]:
        return ["bench.training.gpu", "side", side, str(base), "--batches", sizes, "--cap", str(cap)]

    for number, side, batch_results in in_turn(sides, rounds, words):
        results[side].append(batch_results)
        rates = ", ".join(f"{result['tokens_per_s']:,.0f}" for result in batch_results)
        sys.stderr.write(f"{side}, round {number + 1} of {rounds}: {rates} tokens/s\n")
    lines = []
    for index in range(len(results[sides[0]][0])):
        plain = [batch[index]["tokens_per_s"] for batch in results.get("plain", [])]
        for side in sides:
            many = [batch[index] for batch in results[side]]
            speeds = sorted(result["tokens_per_s"] for result in many)
            middle = statistics.median(speeds)
            lines.append(
                {
                    "batch": many[0]["batch"], "length": many[0]["length"], "side": side,
                    "tokens_per_s": middle, "spread": [speeds[0], speeds[-1]],
                    "against_plain": middle / statistics.median(plain) if plain else None,
                    "allocated_gib": max(result["allocated_gib"] for result in many),
                    "reserved_gib": max(result["reserved_gib"] for result in many),
                    "estimate_gib": many[0].get("estimate_gib"), "setting_up_s": many[0]["setting_up_s"],
                    "first_loss": many[0]["losses"][0], "last_loss": many[0]["losses"][-1],
                }
            )  # fmt: skip
    return {"shape": base.name, "rounds": rounds, "cap_gb": cap, "lines": lines}


def shown(report: dict[str, Any]) -> str:
    """A comparison as a table in Markdown."""
    cap = f", at most {report['cap_gb']:g} GB of the GPU" if report["cap_gb"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    rows = []
    for line in report["lines"]:
        guess, ratio, peak = line["estimate_gib"], line["against_plain"], line["allocated_gib"]
        least, most = line["spread"]
        rows.append(
            [
                f"{line['batch']} x {line['length']}",
                line["side"],
                f"{line['tokens_per_s']:,.0f} ({least:,.0f}, {most:,.0f})",
                f"{ratio:.2f}" if ratio else "-",
                f"{peak:.2f}",
                f"{line['reserved_gib']:.2f}",
                f"{guess:.2f} ({guess / peak - 1:+.0%})" if guess else "-",
                f"{line['last_loss']:.4f}",
            ]
        )
    columns = ("batch", "side", "tokens/s (least, most)", "x plain", "GiB at the peak")
    text = grid.markdown((*columns, "reserved", "estimate", "loss"), rows, left=2)
    title = f"### {report['shape']}, QLoRA of rank 16{cap}"
    return f"{title}\n\n{text}\n{report['gpu']}; {report['rounds']} round(s); {versions}\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training.gpu", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("make", help="random weights")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--shape", choices=tuple(SHAPES), required=True)
    for name in ("run", "side"):
        verb = verbs.add_parser(name)
        if name == "side":
            verb.add_argument("name", choices=SIDES)
            verb.add_argument("--accumulate", type=int, default=1, help="batches a step of one process")
        verb.add_argument("folder", type=Path)
        verb.add_argument("--batches", default="1x1024,4x1024", metavar="BATCHxLENGTH,...")
        verb.add_argument("--cap", type=float, default=0.0, metavar="GB")
    verb = verbs.choices["run"]
    verb.add_argument("--rounds", type=int, default=2)
    verb.add_argument("--sides", default=",".join(SIDES))
    verb.add_argument("--report", type=Path)
    verbs.add_parser("show").add_argument("reports", type=Path, nargs="+")
    args = parser.parse_args(argv)
    if args.verb == "make":
        make(args.folder, args.shape)
    elif args.verb == "show":
        for path in args.reports:
            sys.stdout.write(shown(json.loads(path.read_text(encoding="utf-8"))) + "\n")
    elif args.verb == "side":
        results = measure(args.name, args.folder, args.batches, cap=args.cap, accumulate=args.accumulate)
        sys.stdout.write(json.dumps(results) + "\n")
    else:
        report = compare(args.folder, args.batches, args.rounds, cap=args.cap, sides=args.sides.split(","))
        report |= {"gpu": hardware.gpus()[0].name, "versions": manifest.versions(*_PACKAGES)}
        if args.report:
            args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        sys.stderr.write(shown(report))
        sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
