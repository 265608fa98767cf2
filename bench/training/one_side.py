"""One side of the comparison of training, in a process of its own, so that its peak of memory is its own.

    python -m bench.training.one_side edge|plain CONFIG.yaml [key=value ...] --loss 1.0 [--packed]

The last line is JSON: what `Course.numbers` says. The plain loop is what a tutorial writes with transformers,
peft and bitsandbytes: shuffled batches padded to their longest row, an attention mask, the model's own loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from convert.config import TrainConfig, load_train_config
from edge.console import guarded


class Course:
    """Follows one training run: real tokens, time, and when the smoothed loss is `goal` or less.

    The loss is smoothed over steps, each counting a tenth of what is left; the first counts whole.
    """

    def __init__(self, goal: float) -> None:
        self.goal, self.tokens, self.steps, self.smooth = goal, 0, 0, 0.0
        self.arrived: float | None = None
        self._began = time.monotonic()

    def step(self, loss: float, tokens: int) -> None:
        self.smooth = loss if not self.steps else 0.9 * self.smooth + 0.1 * loss
        self.tokens += tokens
        self.steps += 1
        if self.arrived is None and self.smooth <= self.goal:
            self.arrived = time.monotonic() - self._began

    def numbers(self) -> dict[str, Any]:
        """Seconds are from before the first step; loading the model is not in them."""
        seconds = time.monotonic() - self._began
        return {
            "tokens_per_s": self.tokens / seconds,
            "seconds": seconds,
            "seconds_to_loss": self.arrived,
            "loss": self.smooth,
            "steps": self.steps,
            "memory_peak": memory_peak(),
            "card_peak": card_peak(),
        }


def memory_peak() -> int:
    """The most bytes that this process ever held (resident), loading included."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def card_peak() -> int | None:
    """The most bytes that PyTorch allocated on the card; None without one."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None


def ours(base: Path, config: TrainConfig, items: list[Any], place: Any, goal: float) -> Course:
    from convert.train import cuda_graphs, load_model, trainer

    longest = max(one.size for one in items)
    attention = cuda_graphs.attention_name(place, longest=longest)
    adapted = load_model.add_adapter(load_model.load_model(base, place, attention=attention), config)
    head, _ = cuda_graphs.head(adapted, config, place)
    runner = trainer.Loop(adapted, items, config, device=place.device, dtype=place.dtype, objective=head)
    course, last = Course(goal), 0

    def report(state: Any) -> None:
        nonlocal last
        course.step(state.loss, state.tokens - last)
        last = state.tokens

    runner.run(report)
    return course


def plain(base: Path, config: TrainConfig, items: list[Any], place: Any, goal: float) -> Course:
    """The tutorial's loop, for as many optimizer steps as ours makes of the same rows."""
    import torch

    from convert.train import load_model, trainer

    adapted = load_model.add_adapter(load_model.load_model(base, place), config).train()
    optimizer = torch.optim.AdamW(
        [one for one in adapted.parameters() if one.requires_grad], lr=config.learning_rate
    )
    total = trainer.total_steps(config, len(items))
    shuffle, order, course = random.Random(config.seed), list(items), Course(goal)
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
                group["lr"] = trainer.learning_rate(config, step, total)
            optimizer.step()
            optimizer.zero_grad()
            course.step(float(loss.detach()), sum(one.tokens for one in batch))
            step += 1
            if step == total:
                break
    return course


SIDES = {"edge": ours, "plain": plain}


def run(side: str, config: TrainConfig, goal: float, *, packed: bool = False) -> Course:
    """Train as the configuration says; packed: rows share sequences of cutoff_len."""
    from convert.data import prepare
    from convert.model import chat_format
    from convert.train import load_model

    base = Path(config.model_name_or_path)
    if packed:
        config = dataclasses.replace(config, neat_packing=True)
    items = prepare.prepare(config, chat_format.load(base)).train
    return SIDES[side](base, config, items, load_model.choose_place(config), goal)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training.one_side", description=__doc__.splitlines()[0]
    )
    parser.add_argument("side", choices=tuple(SIDES))
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--loss", type=float, required=True)
    parser.add_argument("--packed", action="store_true")
    args = parser.parse_intermixed_args(argv)
    config = load_train_config(args.config, args.overrides)
    course = run(args.side, config, args.loss, packed=args.packed)
    sys.stdout.write(json.dumps(course.numbers()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
