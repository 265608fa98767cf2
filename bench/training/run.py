"""`edge bench train CONFIG.yaml`: training beside a plain loop of transformers, peft and bitsandbytes.

    edge bench train examples/smollm2_qlora.yaml max_steps=30 --rounds 3
    edge bench train examples/smollm2_qlora.yaml --parts speed,packing,memory,heldout --run RUN
    edge bench train examples/qlora_random_rows.yaml --shape 1.5B --parts batches --batches 1x1024,4x1024

Both sides get the same model, adapter, rows, batch size, optimizer and number of steps, in turn, each in a
process of its own; tokens are real ones, without padding. Further parts: packed rows, random rows in batches
of several sizes, the estimate of memory against the measured peak, and held-out questions. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.measure import metrics
from bench.measure.process_probe import noise, warnings
from bench.report import grid
from bench.report.table import write_files
from bench.training.side import SIDES, in_turn
from convert.config import TrainConfig, load_train_config
from edge.artefact import manifest
from edge.console import plain_table
from edge.errors import UsageError
from edge.machine import hardware

SCHEMA = 3
PARTS = ("speed", "packing", "batches", "memory", "heldout")
SIZES = ("memory_peak", "gpu_peak", "gpu_reserved", "estimate")
HEADINGS = ("", "plain loop", "edge", "better by")
_PACKAGES = ("edge", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")
# Six ways to take memory: batch size, checkpointing, 16-bit weights, packed rows, one row at a time.
SETTINGS: tuple[tuple[str, ...], ...] = (
    ("per_device_train_batch_size=1",),
    ("per_device_train_batch_size=8",),
    ("per_device_train_batch_size=16",),
    ("per_device_train_batch_size=16", "disable_gradient_checkpointing=false"),
    ("per_device_train_batch_size=8", "quantization_bit=null"),
    ("per_device_train_batch_size=4", "neat_packing=true"),
)
# Of Qwen2: hidden size, intermediate size, layers, attention heads, key/value heads.
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "7B": (3584, 18944, 28, 28, 4),
}
VOCABULARY = 151936
# Steps of a batch of random rows, and the first of them, which set up and capture CUDA graphs.
BATCH_STEPS, WARM = 16, 4
DEFINITIONS = {
    "tokens/s": "real tokens trained on, without padding, over the time from before the first step to the "
    "end, of batches of random rows without the first steps; loading the model is not in it; median of the "
    "rounds",
    "seconds to loss": "until the training loss, smoothed over steps (each counts a tenth), is as low as was "
    "asked for",
    "peak memory": "the most that the process ever held (resident), loading included; on a GPU what "
    "PyTorch allocated; reserved: what it took from the driver; estimate: what `edge train` says of ours "
    "before it loads anything",
    "better by": "the geometric mean of the rounds' ratios, each between neighbours in time, with the "
    "smallest and the largest",
}


def random_weights(folder: Path, shape: str) -> None:
    """Write a model of Qwen2's shape, its head and embeddings apart as in DeepSeek's distills."""
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


def speed(part: str, options: argparse.Namespace, console: Console, *more: str) -> dict[str, Any]:
    """Ours against the plain loop, in turn. In the part "packing" ours packs rows into cutoff_len tokens.

    more: further words for both sides.
    """
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}

    def words(side: str) -> list[str]:
        console.print(f"{part}: {side}")
        packing = ["neat_packing=true"] if part == "packing" and side == "edge" else []
        given = [str(options.config), *options.overrides, *packing, "--loss", str(options.loss), *more]
        return ["bench.training.side", side, *given]

    for number, side, numbers in in_turn(SIDES, options.rounds, words):
        results[side].append(numbers)
        console.print(
            f"{part}: {side}, round {number + 1} of {options.rounds}: "
            f"{numbers['tokens_per_s']:.0f} tokens/s, {numbers['memory_peak'] / 2**20:,.0f} MiB, "
            f"loss {numbers['loss']:.3f}"
        )
    return {"goal": options.loss, "rounds": results} | compared(results)


def batches(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """`speed` over random rows, by the size of a batch, such as 4x1024."""
    results = {}
    for size in options.batches.split(","):
        rows, length = size.split("x")
        settings = [f"per_device_train_batch_size={rows}", f"max_steps={BATCH_STEPS}"]
        random_rows = ["--length", length, "--warm", str(WARM), "--cap", str(options.cap)]
        results[size] = speed(size, options, console, *settings, *random_rows)
    return results


def compared(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The medians of each side, and how many times better edge is, round by round."""
    medians: dict[str, Any] = {}
    for side, rounds in results.items():
        arrived = [numbers["seconds_to_loss"] for numbers in rounds]
        medians[side] = {
            "tokens_per_s": statistics.median(numbers["tokens_per_s"] for numbers in rounds),
            "tokens_per_s_interval": metrics.interval([numbers["tokens_per_s"] for numbers in rounds]),
            "least": min(numbers["tokens_per_s"] for numbers in rounds),
            "most": max(numbers["tokens_per_s"] for numbers in rounds),
            # Where a round never arrived there is no median of all.
            "seconds_to_loss": None if None in arrived else statistics.median(arrived),
            "loss": statistics.median(numbers["loss"] for numbers in rounds),
            **{size: max(numbers.get(size) or 0 for numbers in rounds) or None for size in SIZES},
        }
    better = {}
    for figure in ("tokens_per_s", "seconds_to_loss", "memory_peak", "gpu_peak"):
        plain, mine = ([numbers[figure] for numbers in results[side]] for side in SIDES)
        ratio = metrics.ratio(mine, plain) if figure == "tokens_per_s" else metrics.ratio(plain, mine)
        better[figure] = asdict(ratio) if ratio else None
    return {"sides": medians, "better_by": better}


def memory(config: Path, overrides: list[str], steps: int, console: Console) -> list[dict[str, Any]]:
    """Estimate against the peak from the first of `steps` steps on, in GiB, for each of SETTINGS."""
    lines = []
    for setting in SETTINGS:
        words = ["bench.training.side", "edge", str(config), *overrides, *setting, f"max_steps={steps}"]
        [(_, _, numbers)] = in_turn(("edge",), 1, lambda _, words=words: words)  # type: ignore[misc]
        estimated, measured = numbers["estimate"] / 2**30, numbers["training_peak"] / 2**30
        line = {"setting": " ".join(setting), "estimate": round(estimated, 2), "measured": round(measured, 2)}
        lines.append(line | {"off": round(estimated / measured - 1, 3)})
        console.print(
            f"memory: {line['setting']}: {estimated:.2f} GiB, measured {measured:.2f} "
            f"({estimated / measured - 1:+.0%})"
        )
    return lines


def heldout(run: Path, questions: Path, console: Console) -> dict[str, Any]:
    """How many held-out questions the trained adapter of `run` answers with one of their words."""
    from convert.config import FIELDS, parse
    from convert.model import chat_format
    from convert.train import sample_answers
    from convert.train.evaluate import load_tuned
    from convert.train.load_model import choose_place

    trained = manifest.read(run / "adapter")
    config = parse({key: value for key, value in trained.settings.items() if key in FIELDS})
    base = Path(config.model_name_or_path)
    chat = chat_format.load(base, parse_control_tokens=config.parse_control_tokens)
    place = choose_place(config)
    rows = json.loads(questions.read_text(encoding="utf-8"))
    prompts = [chat.prompt([{"role": "user", "content": row["question"]}], trained.thinking) for row in rows]
    model = load_tuned(run / "adapter", base, config, place)
    answers = sample_answers.generate(model, chat, prompts, device=place.device, max_new_tokens=64, size=8)
    hits = len(rows)
    for row, answer in zip(rows, answers, strict=True):
        if not any(word.lower() in answer.lower() for word in row["keywords"]):
            hits -= 1
            console.print(f"heldout: not in persona: {row['question']} -> {answer}")
    seconds = trained.settings["seconds"]
    console.print(f"heldout: {hits} of {len(rows)} in persona, after {seconds:.0f} s of training")
    return {"in_persona": hits, "asked": len(rows), "share": round(hits / len(rows), 3), "seconds": seconds}


def rows_of(part: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, plain, edge, better by) of a part that `speed` measured; sizes that neither has are left out."""
    sides = [
        figures | {size: f"{figures[size] / 2**20:,.0f} MiB" for size in SIZES if figures[size]}
        for figures in (part["sides"][side] for side in SIDES)
    ]
    rows = []
    for title, figure, form in (
        ("tokens/s", "tokens_per_s", "{tokens_per_s:,.0f} ({least:,.0f} to {most:,.0f})"),
        (f"seconds to loss {part['goal']:g}", "seconds_to_loss", "{seconds_to_loss:.1f}"),
        ("peak memory", "memory_peak", "{memory_peak}"),
        ("peak memory of the GPU", "gpu_peak", "{gpu_peak}"),
        ("reserved of the GPU", "gpu_reserved", "{gpu_reserved}"),
        ("estimate", "estimate", "{estimate}"),
        ("loss at the end", "loss", "{loss:.3f}"),
    ):
        if figure in SIZES and all(side[figure] is None for side in sides):
            continue
        missing = "-" if figure in SIZES else "not reached"
        before, after = (missing if side[figure] is None else form.format(**side) for side in sides)
        ratio = part["better_by"].get(figure)
        spread = f", {ratio['low']:.2f} to {ratio['high']:.2f}" if ratio and ratio["pairs"] > 1 else ""
        rows.append((title, before, after, f"{ratio['value']:.2f} x{spread}" if ratio else ""))
    return rows


def compared_parts(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(title, results) of all that `speed` measured."""
    yield from ((name, report[name]) for name in ("speed", "packing") if name in report)
    yield from ((f"random rows, {size}", part) for size, part in report.get("batches", {}).items())


def show(report: dict[str, Any], console: Console) -> None:
    for title, part in compared_parts(report):
        console.print(plain_table(HEADINGS, rows_of(part), title=f"{title}: {report['config']}"))
    for text in report["warnings"]:
        console.print(f"warning: {text}", style="yellow")


def markdown(report: dict[str, Any]) -> str:
    """training.md."""
    lines = [f"# Training: {report['config']}", ""]
    for title, part in compared_parts(report):
        lines += [f"## {title}", "", grid.markdown(HEADINGS, rows_of(part))]
    if "memory" in report:
        cells = [
            [
                f"`{line['setting']}`",
                *(f"{line[key]:.2f}" for key in ("estimate", "measured")),
                f"{line['off']:+.0%}",
            ]
            for line in report["memory"]
        ]
        columns = ("setting", "estimate, GiB", "measured, GiB", "off")
        lines += ["## Memory", "", grid.markdown(columns, cells)]
    if "heldout" in report:
        answers = report["heldout"]
        hits = f"{answers['in_persona']} of {answers['asked']} in persona"
        lines += ["## Held-out questions", "", hits, ""]
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    processors = [hardware.processor(machine), *(gpu["name"] for gpu in machine["gpus"])]
    lines += ["## What the figures mean", "", *(f"- {name}: {text}" for name, text in DEFINITIONS.items())]
    lines += [
        *("", "## Machine", ""),
        f"- {'; '.join(processors)}; {machine['os']}",
        f"- {versions}",
        f"- {report['created']}, {report['seconds']:.0f} s in all: `{report['command']}`",
        *(f"- beware: {text}" for text in report["warnings"]),
    ]
    return "\n".join(lines) + "\n"


def headline(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the last line on standard output says."""
    line: dict[str, Any] = {name: report[name] for name in ("memory", "heldout") if name in report}
    for title, part in compared_parts(report):
        line[title] = {key: part[key] for key in ("goal", "sides", "better_by")}
    return {"config": report["config"], **line, "warnings": len(report["warnings"]), "report": str(folder)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge bench train", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_steps=30")
    parser.add_argument("--parts", default="speed", help=f"some of {','.join(PARTS)} (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each comparison (%(default)s)")
    parser.add_argument("--loss", type=float, default=1.0, help="the loss to arrive at (%(default)s)")
    parser.add_argument("--batches", default="1x1024,4x1024", help="ROWSxTOKENS of batches (%(default)s)")
    parser.add_argument("--cap", type=float, default=0.0, help="GB of the GPU that batches may use; 0: all")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="make model_name_or_path, of random weights")
    parser.add_argument("--steps", type=int, default=8, help="of each memory setting (%(default)s)")
    parser.add_argument("--run", type=Path, help="the run for heldout (default: the configuration's)")
    parser.add_argument("--out", type=Path, help="where training.json and .md go (default: the run folder)")
    options = parser.parse_intermixed_args(argv)
    parts = [part.strip() for part in options.parts.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"--parts: there is no '{unknown[0]}'", f"there are {', '.join(PARTS)}")
    if options.rounds < 1 or options.steps < 1:
        raise UsageError("--rounds and --steps are whole numbers from 1 on")
    if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) for size in options.batches.split(",")):
        raise UsageError(f"--batches {options.batches}: not ROWSxTOKENS", "such as 1x1024,4x1024")
    config = load_train_config(options.config, options.overrides)
    if options.shape and not Path(config.model_name_or_path).exists():
        random_weights(Path(config.model_name_or_path), options.shape)
    console = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)
    began, before = time.perf_counter(), noise()
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "bench-train",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": "edge bench train " + shlex.join(argv),
        "config": str(options.config),
        "machine": hardware.describe(),
        "versions": manifest.versions(*_PACKAGES),
    } | measure(parts, options, config, console)
    after = noise()
    report |= {
        "noise": {"before": asdict(before), "after": asdict(after)},
        "warnings": warnings(before, after),
        "seconds": round(time.perf_counter() - began, 1),
    }
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    out = options.out or Path(config.output_dir)
    if earlier := write_files({"training.json": text, "training.md": markdown(report)}, out):
        console.print(f"the earlier report is kept as {out / f'training-{earlier}.json'} and .md")
    show(report, Console())
    sys.stdout.write(json.dumps(headline(report, out), ensure_ascii=False) + "\n")
    return 0


def measure(
    parts: list[str], options: argparse.Namespace, config: TrainConfig, console: Console
) -> dict[str, Any]:
    """The results of each part, by its name."""
    results: dict[str, Any] = {}
    for part in ("speed", "packing"):
        if part in parts:
            results[part] = speed(part, options, console)
    if "batches" in parts:
        results["batches"] = batches(options, console)
    if "memory" in parts:
        results["memory"] = memory(options.config, options.overrides, options.steps, console)
    if "heldout" in parts:
        questions = Path(config.dataset_dir) / f"{config.dataset[0]}_heldout.json"
        results["heldout"] = heldout(options.run or Path(config.output_dir), questions, console)
    return results
