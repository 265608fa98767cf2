"""What happens beside training: progress and logs, evaluations with answers, checkpoints, early stopping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from convert.train import checkpoint, plots, trackers
from convert.train.trainer import Loop, steps_in_epoch
from convert.train.trainer import Progress as State
from edge.artefact import json_file
from edge.progress import report

# Columns of the bar: on 80 of them the loss and the speed have room beside it.
_BAR = 8
LOG, SAMPLES = "trainer_log.jsonl", "eval_answers.jsonl"


class Watch:
    """Called after each step; True ends the training early. With several processes the first one writes.

    evaluate: returns the loss on the held-out rows; None where there are none. accuracy: returns their
    accuracy. save: writes a checkpoint and
    returns its folder. ask: returns (question, answer) of a few held-out rows.
    """

    def __init__(
        self,
        loop: Loop,
        folder: Path,
        console: Console,
        best: checkpoint.Best,
        *,
        evaluate: Callable[[], float] | None,
        save: Callable[[checkpoint.Best], Path],
        ask: Callable[[], list[tuple[str, str]]],
        accuracy: Callable[[], float] | None = None,
    ) -> None:
        self.best, self._console, self._first = best, console, loop.world.first
        self._loop, self._config, self._folder = loop, loop.config, folder
        self._evaluate, self._save, self._answers, self._accuracy = evaluate, save, ask, accuracy
        self._in_epoch = steps_in_epoch(loop.config, len(loop.items), loop.world.shares)
        self._began = loop.state.step
        self._trackers = trackers.Trackers(loop.config, folder) if self._first else None
        self._bar = Progress(
            TextColumn("training"),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            *([BarColumn(bar_width=_BAR)] if console.width >= 60 else []),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal or not self._first,
        )
        self._task = self._bar.add_task("", total=loop.state.total, completed=self._began)
        if self._first:
            # A resumed run drops what was logged after its checkpoint.
            lines = "".join(json.dumps(line) + "\n" for line in loop.state.history)
            (folder / LOG).write_text(lines, encoding="utf-8")
            if not self._began:
                (folder / SAMPLES).unlink(missing_ok=True)

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
        if self._trackers is not None:
            self._trackers.close()

    def __call__(self, state: State) -> bool:
        config = self._config
        if self._first:
            self._progress(state)
        last = state.step == state.total
        if state.step % config.logging_steps == 0 or last:
            self._log(_line(state))
        saved = False
        if self._evaluate is not None and self._due(
            config.eval_strategy, config.eval_steps or config.logging_steps
        ):
            saved = self.evaluate()
        due = self._due(config.save_strategy, config.save_steps) or (last and config.save_strategy != "no")
        if due and not saved:
            self.save()
        patience = config.early_stopping_steps
        if patience is not None and self.best.waited >= patience:
            self._print(
                f"stopping early at step {state.step}: no better validation loss than {self.best.loss:.4f} "
                f"(step {self.best.step}) in {patience} evaluations"
            )
            return True
        return False

    def _due(self, strategy: str, steps: int) -> bool:
        every = {"epoch": self._in_epoch, "steps": steps}
        return strategy in every and self._loop.state.step % every[strategy] == 0

    def evaluate(self) -> bool:
        """Evaluate and log; True where a checkpoint was written because it is the best one so far."""
        assert self._evaluate is not None
        state = self._loop.state
        report("evaluating", step=state.step)
        loss = self._evaluate()
        better = loss < self.best.loss
        saved = False
        line = {"current_steps": state.step, "total_steps": state.total, "eval_loss": round(loss, 6)}
        if self._accuracy is not None:
            line["eval_accuracy"] = round(self._accuracy(), 6)
        self._log({**line, "epoch": round(state.epoch, 4)})
        self._report(eval_loss=loss)
        self._print(
            f"step {state.step}: validation loss {loss:.4f}"
            + ("" if better else f", best {self.best.loss:.4f}")
        )
        if better:
            self.best = checkpoint.Best(loss, state.step)
            if self._config.keeps_best:
                self.best.folder = str(checkpoint.folder_of(self._folder, state.step))
                self.save()
                saved = True
        else:
            self.best.waited += 1
        if self._first or self._loop.world.sharded:
            self._ask()
        self._loop.world.wait()
        return saved

    def last_evaluation(self) -> float:
        """The validation loss of the weights as they are now."""
        state = self._loop.state
        if not any("eval_loss" in line and line["current_steps"] == state.step for line in state.history):
            self.evaluate()
        return float(next(line["eval_loss"] for line in reversed(state.history) if "eval_loss" in line))

    def save(self) -> Path | None:
        """Write a checkpoint and remove those beyond save_total_limit; the folder is returned."""
        folder = None
        if self._first:
            folder = self._save(self.best)
            checkpoint.prune(self._folder, self._config.save_total_limit, self.best)
        self._loop.world.wait()
        return folder

    def finish(self, results: dict[str, Any]) -> None:
        """Write trainer_state.json, all_results.json with `results` and more figures, and the pictures."""
        if not self._first:
            return
        state = self._loop.state
        results = {
            **results,
            "epoch": state.epoch,
            "train_runtime": round(state.seconds, 2),
            "train_steps_per_second": round(state.step / state.seconds, 3) if state.seconds else 0.0,
            "num_input_tokens_seen": state.tokens,
        }
        accuracies = [line["eval_accuracy"] for line in state.history if "eval_accuracy" in line]
        if accuracies:
            results["eval_accuracy"] = accuracies[-1]
        if "eval_loss" in results:
            results["perplexity"] = math.exp(min(results["eval_loss"], 700.0))
        json_file.write(self._folder / checkpoint.STATE, checkpoint.summary(state, self.best))
        json_file.write(self._folder / "all_results.json", results)
        if self._config.plot_loss:
            for path in plots.draw(self._folder, state.history):
                self._print(f"{path}")

    def _ask(self) -> None:
        for question, answer in self._answers():
            self._print(f"  {question!r} -> {answer!r}")
            line = {"current_steps": self._loop.state.step, "question": question, "answer": answer}
            if self._first:
                with (self._folder / SAMPLES).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _report(self, **figures: float) -> None:
        state = self._loop.state
        about = {"unit": "steps", "seconds_left": state.remaining, "step": state.step}
        report("training", state.step, state.total, **about, **figures)

    def _progress(self, state: State) -> None:
        # Before the figures: words, steps, percentage, time and bar, with blanks between them.
        room = self._console.width - (2 * len(str(state.total)) + _BAR + 33)
        figures = _fitting(
            [
                f"loss {state.loss:.4f}",
                f"{state.tokens_per_second:.0f} tokens/s",
                f"smoothed {state.smooth:.4f}",
                f"lr {state.rate:.1e}",
                f"norm {state.norm:.2f}",
                f"{memory_used(self._loop.device) / 2**30:.1f} GiB",
            ],
            room,
        )
        self._bar.update(self._task, completed=state.step, description=figures)
        self._report(
            epoch=state.epoch,
            loss=state.loss,
            learning_rate=state.rate,
            grad_norm=state.norm,
            tokens_per_s=state.tokens_per_second,
            memory=memory_used(self._loop.device),
        )
        if state.step == self._began + 3 and state.total > state.step:
            self._print(
                f"{state.remaining / (state.total - state.step):.2f} s a step after warming up: "
                f"about {duration(state.remaining)} for the {state.total - state.step} steps to come"
            )

    def _log(self, line: dict[str, Any]) -> None:
        state = self._loop.state
        state.history.append(line)
        if not self._first:
            return
        with (self._folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._trackers is not None:
            self._trackers.log(line)
        if "loss" in line and not self._console.is_terminal:
            self._print(
                f"step {state.step}/{state.total}  loss {state.loss:.4f}  "
                f"{state.tokens_per_second:.0f} tokens/s  {duration(state.remaining)} left"
            )

    def _print(self, text: str) -> None:
        if self._first:
            self._console.print(text)


def memory_used(device: str) -> int:
    """Bytes: allocated on the GPU, or resident in this process."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated())
    if device == "mps":
        return int(torch.mps.current_allocated_memory())
    return int(psutil.Process().memory_info().rss)


def _line(state: State) -> dict[str, Any]:
    """One line of trainer_log.jsonl, with LLaMA-Factory's keys."""
    remaining = state.remaining if math.isfinite(state.remaining) else 0.0
    return {
        "current_steps": state.step,
        "total_steps": state.total,
        "loss": round(state.loss, 6),
        "lr": state.rate,
        "grad_norm": round(state.norm, 4),
        "epoch": round(state.epoch, 4),
        "percentage": round(100 * state.step / state.total, 2),
        "elapsed_time": round(state.seconds, 2),
        "remaining_time": round(remaining, 2),
        "throughput": round(state.tokens_per_second, 2),
        "total_tokens": state.tokens,
    }


def _fitting(parts: list[str], room: int) -> str:
    """The first of `parts` that fit into `room` columns, whole."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) > room:
            break
        line = longer
    return line


def duration(seconds: float) -> str:
    """A length of time in words."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
