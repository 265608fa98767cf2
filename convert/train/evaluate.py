"""`edge eval RUN`: a run on rows it was not trained on, beside its base.

Loss and perplexity, greedy answers against the references (BLEU-4, ROUGE-1/2/L), and both models' answers
side by side. RUN/generated_predictions.jsonl has every answer, RUN/predict_results.json the numbers.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from convert.config import FIELDS, TrainConfig, parse
from convert.data import prepare
from convert.data.dataset_info import Row
from convert.data.encode import Pair, Sample
from convert.model import chat_format
from convert.model.lora_adapter import find_base
from convert.train import bleu_rouge, sample_answers, trainer
from convert.train.load_model import Place, choose_place, load_model
from convert.train.losses import LossHead, by_length
from edge.artefact import manifest
from edge.errors import InputError, UsageError

_SHOWN = 5


@dataclass
class Result:
    """One model on the held-out rows. scores: means, in percent. logs: of each pair's answers (dpo)."""

    loss: float
    answers: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    logs: list[tuple[float, float]] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def run(
    folder: Path,
    *,
    dataset: tuple[str, ...] = (),
    dataset_dir: str | None = None,
    max_samples: int | None = None,
    max_new_tokens: int = 128,
    size: int = 8,
    with_base: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate the run in `folder`; returns what is written to predict_results.json.

    dataset: names in dataset_info.json in place of the rows that training held out. size: rows at a time.
    Raises InputError for a folder without a trained model, UsageError where no rows are held out.
    """
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    stage = next((one for one in ("adapter", "merged") if (folder / one / manifest.FILE).is_file()), None)
    if stage is None:
        raise InputError(f"{folder} has no adapter/ and no merged/", "train first: edge train CONFIG.yaml")
    known = manifest.read(folder / stage)
    config = _config(known, dataset, dataset_dir, max_samples)
    split = bleu_rouge.words()
    base = find_base(known, folder / stage)
    form = chat_format.load(base)
    rows = prepare.held_rows(config)
    made = prepare.prepare(config, form)
    encoded = {item.source for item in made.held}
    rows = [row for row in rows if row.source in encoded]
    seen = {item.source for item in made.train} & {row.source for row in rows} if dataset else set()
    for line in made.report.lines():
        console.print(f"note: {line}", style="yellow")
    if seen:
        console.print(f"note: {len(seen)} of these rows were trained on: they say little", style="yellow")
    place = choose_place(config)
    console.print(f"{len(rows)} rows, {config.model_name_or_path} and {folder / stage} on {place.device}")
    began = time.monotonic()
    found: dict[str, Result] = {}
    model = load_tuned(folder / stage, base, config, place)
    without = getattr(model, "disable_adapter", None)
    job = _Job(form, rows, made.held, config, place, max_new_tokens, size)
    if with_base and without is not None:
        with without():
            found["base"] = job.run(model)
    found["tuned"] = job.run(model)
    if with_base and without is None:
        del model
        found["base"] = job.run(load_model(base, place))
    labels = [sample_answers.reference(row) for row in rows]
    for result in found.values():
        each = [bleu_rouge.score(a, label, split) for a, label in zip(result.answers, labels, strict=True)]
        result.scores = {name: sum(one[name] for one in each) / len(each) for name in bleu_rouge.NAMES}
    seconds = time.monotonic() - began
    _write(folder, job, labels, found)
    results = _results(found, len(rows), seconds)
    _dump(folder / "predict_results.json", results)
    _show(console, rows, labels, found, results)
    console.print(f"{folder / 'generated_predictions.jsonl'}, {folder / 'predict_results.json'}")
    return results


def _config(
    known: manifest.Manifest, dataset: tuple[str, ...], dataset_dir: str | None, max_samples: int | None
) -> TrainConfig:
    """The run's own configuration, with other rows where they are asked for."""
    given = {key: value for key, value in known.settings.items() if key in FIELDS}
    if "dataset" not in given:
        raise InputError("this model was not trained by `edge train`", "give a run folder")
    given |= {"resume_from_checkpoint": None, "packing": False, "neat_packing": False}
    if dataset_dir is not None:
        given["dataset_dir"] = dataset_dir
    if dataset:
        given |= {"eval_dataset": list(dataset), "val_size": 0, "eval_strategy": "no"}
        given |= {"early_stopping_steps": None, "load_best_model_at_end": False}
    config = replace(parse(given), warnings=())
    if not config.val_size and not config.eval_dataset:
        raise UsageError(
            "this run held no rows out: there is nothing that it has not seen",
            "name other rows: --dataset NAME; or train with val_size: 0.1",
        )
    return config if max_samples is None or not dataset else replace(config, max_samples=max_samples)


def load_tuned(stage: Path, base: Path, config: TrainConfig, place: Place) -> Any:
    """The trained model in the folder `stage`, an adapter over `base` or whole."""
    if stage.name == "merged":
        return load_model(stage, place)
    from peft import PeftModel

    model = load_model(base, place, double_quant=config.double_quantization)
    with warnings.catch_warnings():
        # peft asks transformers by an old name.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, str(stage))


@dataclass
class _Job:
    form: chat_format.ChatFormat
    rows: list[Row]
    items: list[Any]
    config: TrainConfig
    place: Place
    max_new_tokens: int
    size: int

    @property
    def prompts(self) -> list[str]:
        return [sample_answers.question(row, self.form, prepare.rules(self.config)) for row in self.rows]

    def run(self, model: Any) -> Result:
        model.eval()
        device = self.place.device
        samples: list[Sample] = [one.chosen if isinstance(one, Pair) else one for one in self.items]
        result = Result(trainer.evaluate(model, samples, size=self.size, device=device))
        result.answers = sample_answers.generate(
            model, self.form, self.prompts, device=device, max_new_tokens=self.max_new_tokens, size=self.size
        )
        pairs = [one for one in self.items if isinstance(one, Pair)]
        if pairs:
            result.logs = _logs(model, pairs, self.size, device)
        return result


def _logs(model: Any, pairs: list[Pair], size: int, device: str) -> list[tuple[float, float]]:
    import torch

    head = LossHead(model)
    found = {}
    with torch.no_grad():
        for batch in by_length(pairs, size):
            sums, _ = head.sums([one.chosen for one in batch] + [one.rejected for one in batch], device)
            for pair, good, bad in zip(batch, *(half.tolist() for half in sums.chunk(2)), strict=True):
                found[id(pair)] = (good, bad)
    return [found[id(pair)] for pair in pairs]


def _results(found: dict[str, Result], rows: int, seconds: float) -> dict[str, Any]:
    """LLaMA-Factory's names for the tuned model; the same with `base_` before them for its base."""
    results: dict[str, Any] = {}
    for name, result in found.items():
        head = "" if name == "tuned" else f"{name}_"
        results[f"{head}eval_loss"] = result.loss
        results[f"{head}perplexity"] = result.perplexity
        results |= {f"{head}predict_{key}": value for key, value in result.scores.items()}
    if "base" in found and found["tuned"].logs:
        gained = [
            (good - good_base) > (bad - bad_base)
            for (good, bad), (good_base, bad_base) in zip(
                found["tuned"].logs, found["base"].logs, strict=True
            )
        ]
        results["rewards_accuracy"] = sum(gained) / len(gained)
    return results | {"predict_samples": rows, "predict_runtime": round(seconds, 2)}


def _write(folder: Path, job: _Job, labels: list[str], found: dict[str, Result]) -> None:
    with (folder / "generated_predictions.jsonl").open("w", encoding="utf-8") as file:
        for at, (prompt, label) in enumerate(zip(job.prompts, labels, strict=True)):
            line = {"prompt": prompt, "predict": found["tuned"].answers[at], "label": label}
            if "base" in found:
                line["base_predict"] = found["base"].answers[at]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _show(
    console: Console, rows: list[Row], labels: list[str], found: dict[str, Result], results: dict[str, Any]
) -> None:
    table = Table()
    order = [name for name in ("base", "tuned") if name in found]
    for column in ("", *order):
        table.add_column(column, justify="left" if not column else "right")
    for key in ("eval_loss", "perplexity", *(f"predict_{name}" for name in bleu_rouge.NAMES)):
        shown = [results[("" if name == "tuned" else "base_") + key] for name in order]
        table.add_row(key, *(f"{value:.4f}" if value < 1e4 else f"{value:.3g}" for value in shown))
    console.print(table)
    if "rewards_accuracy" in results:
        share = results["rewards_accuracy"]
        console.print(f"pairs whose chosen answer gained on the rejected one: {share:.0%}")
    table = Table(show_lines=True)
    for column in ("asked", "reference", *order):
        table.add_column(column, overflow="fold")
    for at, row in enumerate(rows[:_SHOWN]):
        asked = next(one["content"] for one in reversed(row.messages) if one["role"] == "user")
        cells = (str(asked), labels[at], *(found[name].answers[at].strip() for name in order))
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
