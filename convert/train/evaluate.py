"""`edge eval RUN`: a run on rows that it was not trained on, beside its base.

Loss and perplexity, greedy answers against the references (BLEU-4, ROUGE-1/2/L), and both models' answers
side by side. RUN/generated_predictions.jsonl has every answer, RUN/predict_results.json the figures.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from convert.config import FIELDS, TrainConfig, parse
from convert.data import prepare
from convert.data.dataset_info import Row, find_folder
from convert.data.encode import Pair, Sample
from convert.model import chat_format, hub
from convert.model.lora_adapter import find_base, load_format, read_adapter
from convert.train import bleu_rouge, init_adapter, sample_answers, trainer
from convert.train.load_model import Place, choose_place, grow, load_model
from convert.train.losses import LossHead, reference
from edge.artefact import json_file, manifest
from edge.errors import InputError, UsageError
from edge.progress import phase
from edge.prompt import Prompt

_SHOWN = 5
# Where a run has what it trained.
STAGES = ("adapter", "merged")


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
    stages = [name for name in STAGES if (folder / name / manifest.FILE).is_file()]
    if not stages:
        raise InputError(f"{folder} has no adapter/ and no merged/", "train first: edge train CONFIG.yaml")
    stage = folder / stages[0]
    about = manifest.read(stage)
    config = _config(about, dataset, dataset_dir or find_folder(about.settings, stage), max_samples)
    base = find_base(about, stage)
    chat = load_format(stage, base, parse_control_tokens=config.parse_control_tokens)
    data = prepare.prepare(config, chat)
    usable, rows = _asked(config, data)
    for line in data.report.lines():
        console.print(f"note: {line}", style="yellow")
    trained = {item.source for item in data.train} & usable if dataset else set()
    if trained:
        console.print(f"note: {len(trained)} of these rows were trained on: they say little", style="yellow")
    place = choose_place(config)
    console.print(f"{len(usable)} rows, {config.model_name_or_path} and {stage} on {place.device}")
    job = _Job(chat, rows, data.held, config, place, max_new_tokens, size, console)
    return _scored(job, lambda: _both(job, stage, base, with_base=with_base), folder, console)


def predict(config: TrainConfig, *, trained: bool, console: Console | None = None) -> dict[str, Any]:
    """What do_predict asks for: answers to the held-out rows, sampled as `config` says, and their scores.

    trained: by this run, whose model answers; else the base with the adapter that `config` names. Writes to
    output_dir, all_results.json too. Raises UsageError for several adapters, InputError for rows or a model
    that cannot be used.
    """
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    out, adapters = Path(config.output_dir), config.adapter_name_or_path or ()
    base = hub.resolve(config.model_name_or_path, config.model_revision, config.cache_dir)
    if trained:
        stage = next(out / name for name in STAGES if (out / name / manifest.FILE).is_file())
        base = find_base(manifest.read(stage), stage)
    elif len(adapters) > 1:
        raise UsageError("do_predict takes one adapter", "merge them first: edge export CONFIG.yaml")
    else:
        stage = init_adapter.folder_of(adapters[0]) if adapters else base
    chat = (
        load_format(stage, base, parse_control_tokens=config.parse_control_tokens)
        if trained
        else prepare.chat_of(config, base)
    )
    for line in (*config.warnings, *chat.warnings) if not trained else ():
        console.print(f"note: {line}", style="yellow")
    data = prepare.prepare(replace(config, packing=False, neat_packing=False), chat)
    _, rows = _asked(config, data)
    place = choose_place(config)
    console.print(f"{len(rows)} rows to answer, {stage} on {place.device}")
    how = (config.max_new_tokens, config.per_device_eval_batch_size, console, _sampling(config))
    job = _Job(chat, rows, data.held, config, place, *how)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    figures = _scored(job, lambda: _both(job, stage, base, with_base=False), out, console)
    path = out / "all_results.json"
    known = json_file.read(path) if trained else {}
    json_file.write(path, known | figures)
    return figures


def _asked(config: TrainConfig, data: prepare.Prepared) -> tuple[set[str], list[Row]]:
    """(sources of the held-out rows that were not left out, those of them to answer)"""
    usable = {item.source for item in data.held}
    # Plain text asks nothing.
    rows = prepare.held_rows(config) if config.stage != "pt" else []
    return usable, [row for row in rows if row.source in usable]


def _sampling(config: TrainConfig) -> dict[str, Any]:
    """transformers' settings of sampled answers; none for greedy ones."""
    penalty = {"repetition_penalty": config.repetition_penalty}
    if not config.do_sample or not config.temperature:
        return penalty
    return penalty | {
        "do_sample": True,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
    }


def _scored(
    job: _Job, answer: Callable[[], dict[str, Result]], folder: Path, console: Console
) -> dict[str, Any]:
    """Score what `answer` gives, write it to `folder` and show it; the figures are returned."""
    split = bleu_rouge.words()
    began = time.monotonic()
    results = answer()
    for result in results.values():
        pairs = zip(result.answers, job.labels, strict=True)
        scores = [bleu_rouge.score(answer, label, split) for answer, label in pairs]
        names = bleu_rouge.NAMES if scores else ()
        result.scores = {name: sum(one[name] for one in scores) / len(scores) for name in names}
    rows = len({item.source for item in job.items})
    figures = _figures(results, rows, time.monotonic() - began)
    _write(folder, job, results)
    json_file.write(folder / "predict_results.json", figures)
    _show(console, job, results, figures)
    console.print(f"{folder / 'generated_predictions.jsonl'}, {folder / 'predict_results.json'}")
    return figures


def _both(job: _Job, stage: Path, base: Path, *, with_base: bool) -> dict[str, Result]:
    """The results of the model in `stage`, and of its base: without the adapter, or loaded on its own."""
    results: dict[str, Result] = {}
    model = load_tuned(stage, base, job.config, job.place)
    if with_base and hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            results["base"] = job.run(model, "the base")
    results["tuned"] = job.run(model, "the tuned model")
    if with_base and "base" not in results:
        del model
        model = load_model(base, job.place)
        if job.config.grows:
            grow(model, job.chat.tokenizer.get_vocab_size(), job.config.seed)
        results["base"] = job.run(model, "the base")
    return results


def _config(
    about: manifest.Manifest, dataset: tuple[str, ...], dataset_dir: str, max_samples: int | None
) -> TrainConfig:
    """The run's own configuration, with other rows where they are asked for."""
    given = {key: value for key, value in about.settings.items() if key in FIELDS}
    if "dataset" not in given:
        raise InputError("this model was not trained by `edge train`", "give a run folder")
    given |= {"resume_from_checkpoint": None, "packing": False, "neat_packing": False}
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
    if not (stage / "adapter_config.json").is_file():
        return load_model(stage, place)
    from peft import PeftModel

    model = load_model(base, place, double_quant=config.double_quantization)
    if config.grows:
        grow(model, read_adapter(stage).rows(), config.seed)
    with warnings.catch_warnings():
        # peft calls transformers by a deprecated name.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, str(stage))


@dataclass
class _Job:
    chat: chat_format.ChatFormat
    rows: list[Row]
    items: list[Any]
    config: TrainConfig
    place: Place
    max_new_tokens: int
    size: int
    console: Console
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> list[Prompt]:
        return [sample_answers.question(row, self.chat, prepare.rules(self.config)) for row in self.rows]

    @property
    def labels(self) -> list[str]:
        return [sample_answers.reference(row) for row in self.rows]

    def run(self, model: Any, name: str) -> Result:
        with phase(self.console, f"{name} answers"):
            return self._run(model)

    def _run(self, model: Any) -> Result:
        model.eval()
        device = self.place.device
        # Of answers marked good or bad the good ones, where there are any.
        good = [one for one in self.items if getattr(one, "good", True)] or self.items
        samples: list[Sample] = [one.parts[0] for one in good]
        result = Result(trainer.evaluate(model, samples, size=self.size, device=device))
        result.answers = sample_answers.generate(
            model,
            self.chat,
            self.prompts,
            device=device,
            max_new_tokens=self.max_new_tokens,
            size=self.size,
            sampling=self.sampling,
        )
        pairs = [one for one in self.items if isinstance(one, Pair)]
        if pairs:
            logs = reference(LossHead(model), pairs, device, self.size)
            result.logs = [logs[id(pair)] for pair in pairs]
        return result


def _figures(results: dict[str, Result], rows: int, seconds: float) -> dict[str, Any]:
    """LLaMA-Factory's names for the tuned model; the same with `base_` before them for its base."""
    figures: dict[str, Any] = {}
    for name, result in results.items():
        prefix = "" if name == "tuned" else f"{name}_"
        figures[f"{prefix}eval_loss"] = result.loss
        figures[f"{prefix}perplexity"] = result.perplexity
        figures |= {f"{prefix}predict_{key}": value for key, value in result.scores.items()}
    if "base" in results and results["tuned"].logs:
        both = zip(results["tuned"].logs, results["base"].logs, strict=True)
        gained = [tuned[0] - base[0] > tuned[1] - base[1] for tuned, base in both]
        figures["rewards_accuracy"] = sum(gained) / len(gained)
    return figures | {"predict_samples": rows, "predict_runtime": round(seconds, 2)}


def _write(folder: Path, job: _Job, results: dict[str, Result]) -> None:
    with (folder / "generated_predictions.jsonl").open("w", encoding="utf-8") as file:
        for index, (prompt, label) in enumerate(zip(job.prompts, job.labels, strict=True)):
            line = {"prompt": prompt.text, "predict": results["tuned"].answers[index], "label": label}
            if "base" in results:
                line["base_predict"] = results["base"].answers[index]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _show(console: Console, job: _Job, results: dict[str, Result], figures: dict[str, Any]) -> None:
    names = sorted(results)  # the base first
    table = Table("", *(Column(name, justify="right") for name in names))
    keys = ("eval_loss", "perplexity", *(f"predict_{name}" for name in bleu_rouge.NAMES))
    for key in filter(figures.__contains__, keys):
        values = [figures[("" if name == "tuned" else "base_") + key] for name in names]
        table.add_row(key, *(f"{value:.4f}" if value < 1e4 else f"{value:.3g}" for value in values))
    console.print(table)
    if "rewards_accuracy" in figures:
        share = figures["rewards_accuracy"]
        console.print(f"pairs whose chosen answer gained on the rejected one: {share:.0%}")
    if not job.rows:
        return
    table = Table(
        *(Column(name, overflow="fold") for name in ("question", "reference", *names)), show_lines=True
    )
    for index, (row, label) in enumerate(zip(job.rows[:_SHOWN], job.labels, strict=False)):
        question = next(turn["content"] for turn in reversed(row.messages) if turn["role"] == "user")
        cells = (str(question), label, *(results[name].answers[index].strip() for name in names))
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table)
