"""QLoRA on a CUDA card: speed and memory of ours beside a plain loop of peft and bitsandbytes.

    python -m bench.training.gpu make FOLDER --shape 1.5B           random weights of Qwen2's shape
    python -m bench.training.gpu run FOLDER --batches 1x1024,4x1024 [--rounds 2] [--cap 4.0] [--report OUT.json]
    torchrun --nproc-per-node 2 -m bench.training.gpu side edge FOLDER --batches 4x1024

Both sides train rank 16 on all linear layers over NF4 with double quantisation, with checkpointing and paged
AdamW in 8 bits, computing in bf16, on the same random rows that are learnt from end to end. Each round gives
each side a process of its own, which takes all batches in turn. Tokens/s are those of the steps behind the
first few, which set up and record; peaks are those of all steps. --cap: the card's memory that a process may
use, in GB. Under torchrun each process takes its share of a step's batches: compare with one process and
as large an --accumulate. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from convert.config import TrainConfig, parse
from edge.artefact import manifest
from edge.console import guarded
from edge.errors import EdgeError

# Of Qwen2: width, width between, layers, heads, heads of keys and values.
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "7B": (3584, 18944, 28, 28, 4),
}
VOCABULARY = 151936
WARM, STEPS = 4, 12
SIDES = ("plain", "edge")
_PACKAGES = ("edge", "torch", "transformers", "peft", "bitsandbytes")


def make(folder: Path, shape: str) -> None:
    """Random weights in Qwen2's shape, with head and embeddings apart as in DeepSeek's distills."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    width, between, layers, heads, kept = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=width, intermediate_size=between, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kept, vocab_size=VOCABULARY, tie_word_embeddings=False,
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


def rows(many: int, length: int) -> list[Any]:
    """Random rows for all steps."""
    from convert.data.encode import Sample

    draw = random.Random(0)
    return [
        Sample(f"row {n}", array("l", draw.choices(range(VOCABULARY), k=length)), ((1, length),), row=n)
        for n in range(many * (WARM + STEPS))
    ]


def side(name: str, base: Path, batches: list[Any], *, cap: float, accumulate: int) -> list[Any]:
    """What one side makes of each batch: tokens/s, peaks in GiB, the losses, and for ours the estimate."""
    import torch

    from convert.train import cuda_graphs, distributed
    from convert.train import load_model as models

    config = settings(base, 1, accumulate)
    place = models.choose_place(config)
    world = distributed.join(cpu=False)
    if cap:
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / torch.cuda.mem_get_info()[1])
    cuda_graphs.register()
    model = models.load_model(base, place, attention=cuda_graphs.ATTENTION if name == "edge" else "sdpa")
    found = []
    adapted = models.add_adapter(model, config)
    for batch, length in batches:
        config = dataclasses.replace(config, per_device_train_batch_size=batch)
        in_step = batch * accumulate * world.size
        items = rows(in_step, length)
        times, losses = (_ours if name == "edge" else _plain)(adapted, config, items, place, world)
        one = {
            "batch": batch,
            "length": length,
            "in_step": in_step,
            "tokens_per_s": in_step * length / statistics.median(times[WARM:]),
            "setting_up_s": sum(times[:WARM]),
            "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "losses": losses,
        }
        if name == "edge":
            one["estimate_gib"] = _estimate(base, config, items, place)
        found.append(one)
        sys.stderr.write(json.dumps({key: one[key] for key in one if key != "losses"}) + "\n")
    distributed.leave()
    return found if world.first else []


def _estimate(base: Path, config: TrainConfig, items: list[Any], place: Any) -> float:
    from convert.data import prepare
    from convert.train import memory_estimate

    made = prepare.Prepared(train=items, held=[], report=None)  # type: ignore[arg-type]
    return memory_estimate.estimate(base, config, made, place, eager=False, joined=True).total / 2**30


def _forget() -> None:
    """Peaks count from here."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _ours(
    model: Any, config: TrainConfig, items: list[Any], place: Any, world: Any
) -> tuple[list[float], list[float]]:
    from convert.train import cuda_graphs, trainer

    objective, how = cuda_graphs.head(model, config, place)
    sys.stderr.write(how + "\n")
    _forget()
    runner = trainer.Loop(
        model, items, config, device="cuda", dtype=place.dtype, objective=objective, world=world
    )
    times, losses, last = [], [], 0.0

    def report(state: Any) -> None:
        nonlocal last
        times.append(state.seconds - last)
        losses.append(state.loss)
        last = state.seconds

    runner.run(report)
    return times, losses


def _plain(
    model: Any, config: TrainConfig, items: list[Any], place: Any, world: Any
) -> tuple[list[float], list[float]]:
    import bitsandbytes
    import torch

    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW8bit(trained, lr=config.learning_rate)
    model.train()
    _forget()
    times, losses = [], []
    size = config.per_device_train_batch_size
    for at in range(0, len(items), size):
        began = time.monotonic()
        ids = torch.tensor([list(one.ids) for one in items[at : at + size]], device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        times.append(time.monotonic() - began)
    return times, losses


def compare(base: Path, batches: str, rounds: int, *, cap: float, sides: list[str]) -> dict[str, Any]:
    """All rounds of the sides in turn, and a line for each batch and side."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else sides[::-1]:
            words = [
                sys.executable,
                "-m",
                "bench.training.gpu",
                "side",
                name,
                str(base),
                "--batches",
                batches,
            ]
            done = subprocess.run([*words, "--cap", str(cap)], stdout=subprocess.PIPE, check=False)
            if done.returncode:
                raise EdgeError(f"the {name} side failed in round {number + 1}", "its words are above")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    lines = []
    for at in range(len(found[sides[0]][0])):
        for name in sides:
            many = [one[at] for one in found[name]]
            speeds = sorted(one["tokens_per_s"] for one in many)
            middle = statistics.median(speeds)
            plain = [one[at]["tokens_per_s"] for one in found.get("plain", [])]
            lines.append(
                {
                    "batch": many[0]["batch"], "length": many[0]["length"], "side": name,
                    "tokens_per_s": middle, "spread": [speeds[0], speeds[-1]],
                    "against_plain": middle / statistics.median(plain) if plain else None,
                    "allocated_gib": max(one["allocated_gib"] for one in many),
                    "reserved_gib": max(one["reserved_gib"] for one in many),
                    "estimate_gib": many[0].get("estimate_gib"), "setting_up_s": many[0]["setting_up_s"],
                    "first_loss": many[0]["losses"][0], "last_loss": many[0]["losses"][-1],
                }
            )  # fmt: skip
    return {"shape": base.name, "rounds": rounds, "cap_gb": cap, "lines": lines}


def shown(found: dict[str, Any]) -> str:
    """A comparison as a table in Markdown."""
    cap = f", at most {found['cap_gb']:g} GB of the card" if found["cap_gb"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    said = [
        f"### {found['shape']}, QLoRA of rank 16{cap}",
        "",
        "| batch | side | tokens/s (least, most) | x plain | GiB at the peak | reserved | estimate | loss |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found["lines"]:
        guess, ratio, peak = one["estimate_gib"], one["against_plain"], one["allocated_gib"]
        least, most = one["spread"]
        said.append(
            f"| {one['batch']} x {one['length']} | {one['side']} | {one['tokens_per_s']:,.0f} "
            f"({least:,.0f}, {most:,.0f}) | {f'{ratio:.2f}' if ratio else '-'} | {peak:.2f} "
            f"| {one['reserved_gib']:.2f} | {f'{guess:.2f} ({guess / peak - 1:+.0%})' if guess else '-'} "
            f"| {one['last_loss']:.4f} |"
        )
    return "\n".join([*said, "", f"{found['card']}; {found['rounds']} round(s); {versions}", ""])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training.gpu", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("make")
    one.add_argument("folder", type=Path)
    one.add_argument("--shape", choices=tuple(SHAPES), required=True)
    for verb in ("run", "side"):
        one = verbs.add_parser(verb)
        if verb == "side":
            one.add_argument("name", choices=SIDES)
            one.add_argument("--accumulate", type=int, default=1, help="batches a step of one process")
        one.add_argument("folder", type=Path)
        one.add_argument("--batches", default="1x1024,4x1024", metavar="BATCHxLENGTH,...")
        one.add_argument("--cap", type=float, default=0.0, metavar="GB")
        if verb == "run":
            one.add_argument("--rounds", type=int, default=2)
            one.add_argument("--sides", default="plain,edge")
            one.add_argument("--report", type=Path)
    one = verbs.add_parser("show")
    one.add_argument("reports", type=Path, nargs="+")
    args = parser.parse_args(argv)
    if args.verb == "make":
        make(args.folder, args.shape)
        return 0
    if args.verb == "show":
        for path in args.reports:
            sys.stdout.write(shown(json.loads(path.read_text(encoding="utf-8"))) + "\n")
        return 0
    if args.verb == "side":
        pairs = [tuple(map(int, one.split("x"))) for one in args.batches.split(",")]
        found: Any = side(args.name, args.folder, pairs, cap=args.cap, accumulate=args.accumulate)
    else:
        import torch

        found = compare(args.folder, args.batches, args.rounds, cap=args.cap, sides=args.sides.split(","))
        found |= {"card": torch.cuda.get_device_name(), "versions": manifest.versions(*_PACKAGES)}
        if args.report:
            args.report.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        sys.stderr.write(shown(found))
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
