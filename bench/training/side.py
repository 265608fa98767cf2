"""One side of a comparison of training, in a process of its own, so that its peak of memory is its own.

    python -m bench.training.side edge|plain CONFIG.yaml [key=value ...] --loss 1.0
    torchrun --nproc-per-node 2 -m bench.training.side edge CONFIG.yaml max_steps=16 --length 1024 --warm 4

"edge" trains as `edge train` does. "plain" is the loop that a tutorial writes with transformers, peft and
bitsandbytes: shuffled batches padded to their longest row, an attention mask, the model's own loss. --length
trains random rows of that many tokens in place of the configuration's data. One clock times both sides: the
wall time around each step, its data included, with the device synchronised. The last line is JSON:
`Course.numbers`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from edge.console import guarded
from edge.errors import EdgeError

if TYPE_CHECKING:
    from convert.config import TrainConfig
    from convert.train.finetune import Run

SIDES = ("plain", "edge")
# The pseudo-file of Linux that starts the peak of resident memory again.
_CLEAR = Path("/proc/self/clear_refs")


class Course:
    """Follows a run: tokens without padding, losses, times, and when the smoothed loss is `goal` or less.

    Seconds count from `begin`, right before the first step. The loss is smoothed over steps, each of which
    counts a tenth; the first counts whole. warm: first steps that the rate leaves out, for they set up and
    capture CUDA graphs.
    """

    def __init__(self, goal: float = 0.0, warm: int = 0) -> None:
        self.goal, self.warm, self.smooth = goal, warm, 0.0
        self.tokens = self.warm_tokens = 0
        self.losses: list[float] = []
        self.times: list[float] = []
        self.arrived: float | None = None

    def begin(self) -> None:
        import torch

        self.loading_peak = memory_peak()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if _CLEAR.exists():
            _CLEAR.write_text("5", encoding="utf-8")
        self._began = synchronised_time()

    def step(self, loss: float, tokens: int) -> None:
        self.times.append(synchronised_time() - self._began)
        self.smooth = 0.9 * self.smooth + 0.1 * loss if self.losses else loss
        self.tokens += tokens
        self.losses.append(loss)
        if len(self.losses) == self.warm:
            self.warm_tokens = self.tokens
        if self.arrived is None and self.smooth <= self.goal:
            self.arrived = self.times[-1]

    def step_seconds(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise([0.0, *self.times])]

    def numbers(self) -> dict[str, Any]:
        """memory_peak: bytes of the process, loading included; training_peak: from the first step on, of the
        GPU where there is one; gpu_peak, gpu_reserved: what PyTorch allocated there and took from the driver,
        None without one. loss: smoothed.
        """
        import torch

        on_gpu = torch.cuda.is_available()
        gpu = int(torch.cuda.max_memory_allocated()) if on_gpu else None
        peak = memory_peak()
        return {
            "tokens_per_s": (self.tokens - self.warm_tokens) / sum(self.step_seconds()[self.warm :]),
            "seconds": self.times[-1],
            "setting_up_s": sum(self.step_seconds()[: self.warm]),
            "seconds_to_loss": self.arrived,
            "loss": self.smooth,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "steps": len(self.losses),
            "memory_peak": max(self.loading_peak, peak),
            "training_peak": gpu or peak,
            "gpu_peak": gpu,
            "gpu_reserved": int(torch.cuda.max_memory_reserved()) if on_gpu else None,
        }


def synchronised_time() -> float:
    """Seconds on a monotonic clock, once the GPU has done all that it was asked for."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def memory_peak() -> int:
    """The most bytes that this process held (resident): on Linux since `Course.begin`, elsewhere ever."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info()._asdict()["peak_wset"])
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def begin(config: TrainConfig, length: int) -> Run:
    """The run of a configuration; length: over random rows of so many tokens, 0: over its own data.

    Random rows are as many as all steps take. The model then needs no tokenizer.
    """
    from rich.console import Console

    from convert.data.prepare import Prepared
    from convert.model.hf_folder import read_config
    from convert.train import distributed, finetune, memory_estimate
    from convert.train.load_model import choose_place

    console, place = Console(stderr=True), choose_place(config)
    world = distributed.join(cpu=place.device == "cpu")
    if not length:
        return finetune.Run.begin(config, overwrite=True, console=console, again="", world=world)
    config = dataclasses.replace(config, cutoff_len=length)
    base = Path(config.model_name_or_path)
    in_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
    # Neither a chat format nor a report: the rows are random.
    nothing: Any = None
    rows = random_rows(in_step * config.max_steps, length, read_config(base)["vocab_size"])
    data = Prepared(rows, [], nothing)
    run = finetune.Run(config, base, nothing, data, place, world, None, console, again="", given=config)
    run.need = memory_estimate.estimate(base, config, data, place)
    return run


def random_rows(count: int, length: int, vocabulary: int) -> list[Any]:
    """`count` rows of `length` random tokens, all of which are learnt."""
    from convert.data.encode import Sample

    draw = random.Random(0)
    return [
        Sample(f"row {n}", array("l", draw.choices(range(vocabulary), k=length)), ((1, length),), row=n)
        for n in range(count)
    ]


def train(side: str, run: Run, course: Course) -> None:
    """Load the base of a run, put its adapter over it and train, as the side does."""
    if side == "plain":
        return _plain(run, course)
    from convert.train import cuda_graphs

    before = 0

    def report(state: Any) -> None:
        nonlocal before
        course.step(state.loss, state.tokens - before)
        before = state.tokens

    run.load()
    with cuda_graphs.own_stream(run.place):
        run.build_objective()
        run.resume()
        course.begin()
        run.loop.run(report)


def _plain(run: Run, course: Course) -> None:
    """As many optimizer steps as ours makes of the same rows."""
    import bitsandbytes
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from convert.train import load_model, trainer

    config, device = run.config, run.place.device
    model = load_model.add_adapter(load_model.load_model(run.base, run.place), config).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    paged = config.optim == "paged_adamw_8bit"
    optimizer = (bitsandbytes.optim.PagedAdamW8bit if paged else torch.optim.AdamW)(
        weights, lr=config.learning_rate
    )
    total = trainer.total_steps(config, len(run.data.train))
    course.begin()
    for step, batch in zip(range(total), _batches(run), strict=False):
        ids = pad_sequence([torch.tensor(item.ids, dtype=torch.long) for item in batch], True)
        mask = pad_sequence([torch.ones(item.size, dtype=torch.long) for item in batch], True)
        labels = pad_sequence([torch.tensor(item.labels, dtype=torch.long) for item in batch], True, -100)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = trainer.learning_rate(config, step, total)
        optimizer.step()
        optimizer.zero_grad()
        course.step(float(loss.detach()), sum(item.tokens for item in batch))


def _batches(run: Run) -> Iterator[list[Any]]:
    """Batches of all epochs, without an end."""
    from convert.train import trainer

    items, size = list(run.data.train), run.config.per_device_train_batch_size
    shuffle = random.Random(run.config.seed)
    while True:
        if not run.config.disable_shuffling:
            shuffle.shuffle(items)
        yield from trainer.batches(items, size, None)


def in_turn(
    sides: Sequence[str], rounds: int, words: Callable[[str], list[str]]
) -> Iterator[tuple[int, str, Any]]:
    """Run `python -m WORDS` for each side and round, and yield (round, side, the JSON of its last line).

    The order alternates. Raises EdgeError with the last words of a process that fails.
    """
    for number in range(rounds):
        for side in sides[:: -1 if number % 2 else 1]:
            process = subprocess.run([sys.executable, "-m", *words(side)], capture_output=True, check=False)
            if process.returncode:
                tail = process.stderr.decode("utf-8", "replace").strip().splitlines()[-6:]
                raise EdgeError(f"training with the {side} loop failed", "\n  ".join(tail))
            yield number, side, json.loads(process.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training.side", description=__doc__.splitlines()[0]
    )
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--loss", type=float, default=0.0, help="the loss to arrive at")
    parser.add_argument("--warm", type=int, default=0, help="first steps that the rate leaves out")
    parser.add_argument("--length", type=int, default=0, help="tokens of random rows; 0: the data")
    parser.add_argument("--cap", type=float, default=0.0, help="GB of the GPU that it may use; 0: all")
    args = parser.parse_intermixed_args(argv)
    from convert.config import load_train_config
    from convert.train import distributed

    config = load_train_config(args.config, args.overrides)
    course = Course(args.loss, args.warm)
    # What is in the configuration's own folder stays as it is.
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as folder:
        run = begin(dataclasses.replace(config, output_dir=folder), args.length)
        if args.cap:
            import torch

            torch.cuda.set_per_process_memory_fraction(args.cap * 1e9 / torch.cuda.mem_get_info()[1])
        train(args.side, run, course)
        numbers = course.numbers() | ({"estimate": run.need.total} if args.side == "edge" else {})
    if run.world.first:
        sys.stdout.write(json.dumps(numbers) + "\n")
    distributed.leave()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
