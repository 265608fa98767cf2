"""The figures of training: speed against a plain loop, packing, memory, time to a loss, held-out questions.

    python -m bench.train examples/smollm2_qlora.yaml [--parts speed,packing,memory,heldout] [--run RUN]

The plain loop is what a tutorial writes with transformers, peft and bitsandbytes: shuffled batches padded to
their longest row, an attention mask, the model's own loss. Both get the same model, adapter, rows, batch size
and optimizer, in turn in one process; tokens are real ones, without padding. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from edge.cli import guarded
from edge.config import TrainConfig, load_train_config
from edge.errors import EdgeError

PARTS = ("speed", "packing", "memory", "heldout")
# Six ways to take memory: batch size, checkpointing, 16-bit weights, packed rows, one row at a time.
SETTINGS: tuple[tuple[str, ...], ...] = (
    ("per_device_train_batch_size=1",),
    ("per_device_train_batch_size=8",),
    ("per_device_train_batch_size=16",),
    ("per_device_train_batch_size=16", "disable_gradient_checkpointing=false"),
    ("per_device_train_batch_size=8", "quantization_bit=null"),
    ("per_device_train_batch_size=4", "neat_packing=true"),
)
_LOSS = 1.0


@dataclasses.dataclass
class Pace:
    """Tokens a second of each round, and the seconds of training to a smoothed loss of _LOSS (or None)."""

    rates: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float | None] = dataclasses.field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        known = [one for one in self.seconds if one is not None]
        return {
            "tokens_per_second": round(statistics.median(self.rates), 1),
            "rounds": [round(one, 1) for one in self.rates],
            f"seconds_to_loss_{_LOSS:g}": round(statistics.median(known), 1) if known else None,
        }


class Course:
    """Follows one training run: real tokens, time, and when the smoothed loss is low enough."""

    def __init__(self) -> None:
        self.tokens, self.smooth, self.arrived = 0, 0.0, None
        self._began = time.monotonic()

    def step(self, loss: float, tokens: int) -> None:
        self.smooth = loss if not self.tokens else 0.9 * self.smooth + 0.1 * loss
        self.tokens += tokens
        if self.arrived is None and self.smooth <= _LOSS:
            self.arrived = time.monotonic() - self._began

    def into(self, pace: Pace) -> None:
        pace.rates.append(self.tokens / (time.monotonic() - self._began))
        pace.seconds.append(self.arrived)


def ours(base: Path, config: TrainConfig, items: list[Any], place: Any, pace: Pace) -> None:
    from convert import loop, model

    longest = max(one.size for one in items)
    eager = place.device == "cpu" and longest <= 512
    adapted = model.add_adapter(model.load_model(base, place, attention="eager" if eager else "sdpa"), config)
    runner = loop.Loop(adapted, items, config, device=place.device, dtype=place.dtype)
    course, last = Course(), 0

    def report(state: Any) -> None:
        nonlocal last
        course.step(state.loss, state.tokens - last)
        last = state.tokens

    runner.run(report)
    course.into(pace)


def plain(base: Path, config: TrainConfig, items: list[Any], place: Any, pace: Pace) -> None:
    """The tutorial's loop, for as many optimizer steps as ours makes of the same rows."""
    import torch

    from convert import loop, model

    adapted = model.add_adapter(model.load_model(base, place), config).train()
    optimizer = torch.optim.AdamW(
        [one for one in adapted.parameters() if one.requires_grad], lr=config.learning_rate
    )
    total = loop.total_steps(config, len(items))
    shuffle, order, course = random.Random(config.seed), list(items), Course()
    step = 0
    while step < total:
        shuffle.shuffle(order)
        for at in range(0, len(order), config.per_device_train_batch_size):
            batch = order[at : at + config.per_device_train_batch_size]
            longest = max(one.size for one in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
            for line, one in enumerate(batch):
                ids[line, : one.size] = torch.tensor(one.ids)
                mask[line, : one.size] = 1
                labels[line, : one.size] = torch.tensor(one.labels)
            where = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            loss = adapted(**{key: value.to(place.device) for key, value in where.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapted.parameters(), config.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = loop.learning_rate(config, step, total)
            optimizer.step()
            optimizer.zero_grad()
            course.step(float(loss.detach()), sum(one.tokens for one in batch))
            step += 1
            if step == total:
                break
    course.into(pace)


def speed(config: TrainConfig, rounds: int, *, packed: bool, console: Console) -> dict[str, Any]:
    """Ours against the plain loop, in turn. packed: ours packs its rows into sequences of cutoff_len."""
    from convert import model, prepare, template

    base = Path(config.model_name_or_path)
    form = template.load(base)
    rows = prepare.prepare(config, form).train
    mine = dataclasses.replace(config, neat_packing=packed)
    packs = prepare.prepare(mine, form).train if packed else rows
    place = model.choose_place(config)
    paces = {"edge": Pace(), "plain": Pace()}
    for number in range(rounds):
        order = [("edge", lambda pace: ours(base, mine, packs, place, pace)),
                 ("plain", lambda pace: plain(base, config, rows, place, pace))]  # fmt: skip
        for name, job in order if number % 2 else reversed(order):
            job(paces[name])
            console.print(f"{'packing' if packed else 'speed'}: {name} {paces[name].rates[-1]:.0f} tokens/s")
    found = {name: pace.numbers() for name, pace in paces.items()}
    pairs = zip(paces["edge"].rates, paces["plain"].rates, strict=True)
    return found | {"better_by": round(statistics.median(one / other for one, other in pairs), 2)}


def memory(path: Path, overrides: list[str], steps: int, console: Console) -> list[dict[str, Any]]:
    """Estimate against the peak of a process that only trains, `steps` steps, for each of SETTINGS."""
    found = []
    for setting in SETTINGS:
        words = [*overrides, *setting, f"max_steps={steps}", "save_strategy=no"]
        with tempfile.TemporaryDirectory(prefix="edge-bench-") as folder:
            command = [sys.executable, "-m", "bench.peak", str(path), *words]
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
    from convert import answers, template
    from convert.eval import load_tuned
    from convert.model import choose_place
    from edge import manifest
    from edge.config import FIELDS, parse

    known = manifest.read(run / "adapter")
    config = parse({key: value for key, value in known.settings.items() if key in FIELDS})
    base = Path(config.model_name_or_path)
    form, place = template.load(base), choose_place(config)
    rows = json.loads(questions.read_text(encoding="utf-8"))
    prompts = [form.prompt([{"role": "user", "content": row["question"]}], known.thinking) for row in rows]
    model = load_tuned(run / "adapter", base, config, place)
    said = answers.generate(model, form, prompts, device=place.device, max_new_tokens=64, size=8)
    hits = 0
    for row, answer in zip(rows, said, strict=True):
        hit = any(word.lower() in answer.lower() for word in row["keywords"])
        hits += hit
        if not hit:
            console.print(f"heldout: not in persona: {row['question']} -> {answer}")
    seconds = known.settings["seconds"]
    console.print(f"heldout: {hits} of {len(rows)} in persona, after {seconds:.0f} s of training")
    return {"in_persona": hits, "asked": len(rows), "share": round(hits / len(rows), 3), "seconds": seconds}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="of speed and packing (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="of each memory setting (%(default)s)")
    parser.add_argument("--run", type=Path, help="the run for heldout (default: the configuration's)")
    options = parser.parse_intermixed_args(argv)
    config = load_train_config(options.config, options.overrides)
    console = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)
    parts = [part for part in options.parts.split(",") if part in PARTS]
    found: dict[str, Any] = {"config": str(options.config)}
    for part in ("speed", "packing"):
        if part in parts:
            found[part] = speed(config, options.rounds, packed=part == "packing", console=console)
    if "memory" in parts:
        found["memory"] = memory(options.config, options.overrides, options.steps, console)
    if "heldout" in parts:
        questions = Path(config.dataset_dir) / f"{config.dataset[0]}_heldout.json"
        found["heldout"] = heldout(options.run or Path(config.output_dir), questions, console)
    sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
