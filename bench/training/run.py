"""`edge bench train CONFIG.yaml`: training beside a plain loop of transformers, peft and bitsandbytes.

    edge bench train examples/smollm2_qlora.yaml max_steps=30 --rounds 3
    edge bench train examples/smollm2_qlora.yaml --parts speed,packing,memory,heldout --run RUN

Both sides get the same model, adapter, rows, batch size, optimizer and number of steps, in turn, each in a
process of its own; tokens are real ones, without padding. Further parts: packed rows, the estimate of memory
against the measured peak, and held-out questions. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure import metrics
from bench.measure.process_probe import noise
from bench.report.table import write_files
from convert.config import load_train_config
from edge.artefact import manifest
from edge.console import guarded
from edge.errors import EdgeError, UsageError
from edge.machine import hardware

SCHEMA = 1
PARTS = ("speed", "packing", "memory", "heldout")
PAUSE_S = 1.0
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
DEFINITIONS = {
    "tokens/s": "real tokens trained on, without padding, over the time from before the first step to the "
    "end; loading the model is not in it; median of the rounds",
    "seconds to loss": "until the training loss, smoothed over steps (each counts a tenth), is as low as was "
    "asked for",
    "peak memory": "the most that the process ever held (resident), loading included; on a card what PyTorch "
    "allocated",
    "better by": "the geometric mean of the rounds' ratios, each between neighbours in time, with the "
    "smallest and the largest",
}


def speed(
    path: Path, overrides: list[str], rounds: int, goal: float, *, packed: bool, console: Console
) -> dict[str, Any]:
    """Ours against the plain loop, in turn. packed: ours packs its rows into sequences of cutoff_len."""
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "edge": []}
    name = "packing" if packed else "speed"
    for number in range(rounds):
        for side in ("plain", "edge") if number % 2 == 0 else ("edge", "plain"):
            more = ["--packed"] if packed and side == "edge" else []
            with console.status(f"{name}: {side}, round {number + 1} of {rounds}"):
                time.sleep(PAUSE_S)
                numbers = _side(side, path, overrides, goal, more)
            found[side].append(numbers)
            console.print(
                f"{name}: {side}, round {number + 1} of {rounds}: {numbers['tokens_per_s']:.0f} tokens/s, "
                f"{numbers['memory_peak'] / 2**20:,.0f} MiB, loss {numbers['loss']:.3f}"
            )
    return {"goal": goal, "rounds": found} | _compared(found)


def _side(side: str, path: Path, overrides: list[str], goal: float, more: list[str]) -> dict[str, Any]:
    """What one run in a process of its own says. Raises EdgeError with its last words."""
    command = [
        sys.executable,
        "-m",
        "bench.training.one_side",
        side,
        str(path),
        *overrides,
        "--loss",
        str(goal),
    ]
    done = subprocess.run([*command, *more], capture_output=True, check=False)
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()[-6:]
        raise EdgeError(f"training with the {side} loop failed", "\n  ".join(words))
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def _compared(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The medians of each side, and how many times better edge is, round by round."""
    middle: dict[str, Any] = {}
    for side, rounds in found.items():
        arrived = [one["seconds_to_loss"] for one in rounds if one["seconds_to_loss"] is not None]
        cards = [one["card_peak"] for one in rounds if one["card_peak"] is not None]
        middle[side] = {
            "tokens_per_s": statistics.median(one["tokens_per_s"] for one in rounds),
            "tokens_per_s_interval": metrics.interval([one["tokens_per_s"] for one in rounds]),
            # Where a round never arrived there is no median of all.
            "seconds_to_loss": statistics.median(arrived) if len(arrived) == len(rounds) else None,
            "loss": statistics.median(one["loss"] for one in rounds),
            "memory_peak": max(one["memory_peak"] for one in rounds),
            "card_peak": max(cards, default=None),
        }
    better = {}
    for figure, more in (
        ("tokens_per_s", True), ("seconds_to_loss", False), ("memory_peak", False), ("card_peak", False)
    ):  # fmt: skip
        ours, theirs = ([one[figure] for one in found[side]] for side in ("edge", "plain"))
        ratio = metrics.ratio(*((ours, theirs) if more else (theirs, ours)))
        better[figure] = asdict(ratio) if ratio else None
    return {"sides": middle, "better_by": better}


def memory(path: Path, overrides: list[str], steps: int, console: Console) -> list[dict[str, Any]]:
    """Estimate against the peak of a process that only trains, `steps` steps, for each of SETTINGS."""
    found = []
    for setting in SETTINGS:
        words = [*overrides, *setting, f"max_steps={steps}", "save_strategy=no"]
        with tempfile.TemporaryDirectory(prefix="edge-bench-") as folder:
            command = [sys.executable, "-m", "bench.training.peak_memory", str(path), *words]
            command.append(f"output_dir={folder}/run")
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = done.stdout.decode("utf-8", "replace")
        lines = {line.split()[0]: line.split()[1] for line in said.splitlines() if len(line.split()) > 1}
        if done.returncode or not {"memory:", "peak:"} <= set(lines):
            raise EdgeError(f"training with {' '.join(setting)} failed", said[-500:])
        estimated, measured = float(lines["memory:"]), float(lines["peak:"])
        off = estimated / measured - 1
        numbers = {"estimate": estimated, "measured": round(measured, 2), "off": round(off, 3)}
        found.append({"setting": " ".join(setting)} | numbers)
        console.print(
            f"memory: {' '.join(setting)}: {estimated:.2f} GiB, measured {measured:.2f} ({off:+.0%})"
        )
    return found


def heldout(run: Path, questions: Path, console: Console) -> dict[str, Any]:
    """How many held-out questions the trained adapter of `run` answers with one of their words."""
    from convert.config import FIELDS, parse
    from convert.model import chat_format
    from convert.train import sample_answers
    from convert.train.evaluate import load_tuned
    from convert.train.load_model import choose_place
    from edge.artefact import manifest

    known = manifest.read(run / "adapter")
    config = parse({key: value for key, value in known.settings.items() if key in FIELDS})
    base = Path(config.model_name_or_path)
    form, place = chat_format.load(base), choose_place(config)
    rows = json.loads(questions.read_text(encoding="utf-8"))
    prompts = [form.prompt([{"role": "user", "content": row["question"]}], known.thinking) for row in rows]
    model = load_tuned(run / "adapter", base, config, place)
    said = sample_answers.generate(model, form, prompts, device=place.device, max_new_tokens=64, size=8)
    hits = 0
    for row, answer in zip(rows, said, strict=True):
        hit = any(word.lower() in answer.lower() for word in row["keywords"])
        hits += hit
        if not hit:
            console.print(f"heldout: not in persona: {row['question']} -> {answer}")
    seconds = known.settings["seconds"]
    console.print(f"heldout: {hits} of {len(rows)} in persona, after {seconds:.0f} s of training")
    return {"in_persona": hits, "asked": len(rows), "share": round(hits / len(rows), 3), "seconds": seconds}


def rows_of(part: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, plain, edge, better by) of a part that `speed` measured."""
    plain, mine = part["sides"]["plain"], part["sides"]["edge"]
    found = []
    for title, figure, show_ in (
        ("tokens/s", "tokens_per_s", lambda v: f"{v:.0f}"),
        (f"seconds to loss {part['goal']:g}", "seconds_to_loss", lambda v: f"{v:.1f}"),
        ("peak memory", "memory_peak", lambda v: f"{v / 2**20:,.0f} MiB"),
        ("peak memory of the card", "card_peak", lambda v: f"{v / 2**20:,.0f} MiB"),
        ("loss at the end", "loss", lambda v: f"{v:.3f}"),
    ):
        cells = [show_(side[figure]) if side[figure] is not None else "not reached" for side in (plain, mine)]
        if figure == "card_peak" and plain[figure] is None:
            continue
        ratio = part["better_by"].get(figure)
        spread = f", {ratio['low']:.2f} to {ratio['high']:.2f}" if ratio and ratio["pairs"] > 1 else ""
        found.append((title, cells[0], cells[1], f"{ratio['value']:.2f} x{spread}" if ratio else ""))
    return found


def show(made: dict[str, Any], console: Console) -> None:
    for name in ("speed", "packing"):
        if name in made:
            table = Table(title=f"{name}: {made['config']}", title_justify="left")
            for heading in ("", "plain loop", "edge", "better by"):
                table.add_column(heading, justify="left" if not heading else "right")
            for row in rows_of(made[name]):
                table.add_row(*row)
            console.print(table)
    for text in made["warnings"]:
        console.print(f"warning: {text}", style="yellow")


def markdown(made: dict[str, Any]) -> str:
    """training.md."""
    lines = [f"# Training: {made['config']}", ""]
    for name in ("speed", "packing"):
        if name in made:
            lines += [f"## {name}", "", "| | plain loop | edge | better by |", "| --- | ---: | ---: | ---: |"]
            lines += [f"| {' | '.join(row)} |" for row in rows_of(made[name])]
            lines.append("")
    if "memory" in made:
        lines += ["## Memory", "", "| setting | estimate, GiB | measured, GiB | off |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        lines += [
            f"| `{one['setting']}` | {one['estimate']:.2f} | {one['measured']:.2f} | {one['off']:+.0%} |"
            for one in made["memory"]
        ]
        lines.append("")
    if "heldout" in made:
        found = made["heldout"]
        lines += ["## Held-out questions", "", f"{found['in_persona']} of {found['asked']} in persona", ""]
    machine = made["machine"]
    lines += [
        "## What the figures mean",
        "",
        *(f"- {name}: {text}" for name, text in DEFINITIONS.items()),
        "",
    ]
    lines += ["## Machine", "", f"- {machine['cpu']}, {machine['threads']} cores, {machine['os']}"]
    lines += [f"- {', '.join(f'{name} {version}' for name, version in made['versions'].items())}"]
    lines += [f"- {made['created']}, {made['seconds']:.0f} s in all: `{made['command']}`"]
    lines += [f"- beware: {text}" for text in made["warnings"]]
    return "\n".join(lines) + "\n"


def headline(made: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the last line on standard output says."""
    kept = {name: made[name] for name in ("memory", "heldout") if name in made}
    for name in ("speed", "packing"):
        if name in made:
            kept[name] = {key: made[name][key] for key in ("goal", "sides", "better_by")}
    return {"config": made["config"], **kept, "warnings": len(made["warnings"]), "report": str(folder)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge bench train", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_steps=30")
    parser.add_argument("--parts", default="speed", help=f"some of {','.join(PARTS)} (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of speed and packing (%(default)s)")
    parser.add_argument("--loss", type=float, default=1.0, help="the loss to arrive at (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of each memory setting (%(default)s)")
    parser.add_argument("--run", type=Path, help="the run for heldout (default: the configuration's)")
    parser.add_argument("--out", type=Path, help="where training.json and .md go (default: the run folder)")
    options = parser.parse_intermixed_args(argv)
    parts = [part.strip() for part in options.parts.split(",")]
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"--parts: '{part}' is not known", f"known are {', '.join(PARTS)}")
    if options.rounds < 1 or options.steps < 1:
        raise UsageError("--rounds and --steps are whole numbers from 1 on")
    config = load_train_config(options.config, options.overrides)
    run, out = options.run or Path(config.output_dir), options.out or Path(config.output_dir)
    console = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)
    began, before = time.perf_counter(), noise()
    made = _describe(options.config, "edge bench train " + shlex.join(argv))
    for part in ("speed", "packing"):
        if part in parts:
            given = (options.config, options.overrides, options.rounds, options.loss)
            made[part] = speed(*given, packed=part == "packing", console=console)
    if "memory" in parts:
        made["memory"] = memory(options.config, options.overrides, options.steps, console)
    if "heldout" in parts:
        questions = Path(config.dataset_dir) / f"{config.dataset[0]}_heldout.json"
        made["heldout"] = heldout(run, questions, console)
    after = noise()
    made["noise"] = {"before": asdict(before), "after": asdict(after)}
    made["warnings"] = [
        f"the machine was not quiet {when}: {one.warning}"
        for when, one in (("before", before), ("after", after))
        if one.warning
    ]
    made["seconds"] = round(time.perf_counter() - began, 1)
    text = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    write_files({"training.json": text, "training.md": markdown(made)}, out)
    show(made, Console())
    sys.stdout.write(json.dumps(headline(made, out), ensure_ascii=False) + "\n")
    return 0


def _describe(config: Path, command: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": "bench-train",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "config": str(config),
        "machine": hardware.describe(),
        "versions": manifest.versions(*_PACKAGES),
    }


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
