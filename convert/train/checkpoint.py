"""Checkpoints: everything that decides how training goes on, written whole or not at all.

    RUN/checkpoint-N/   weights, optimizer.safetensors, random.safetensors, trainer_state.json, edge.json;
                        adapter_config.json where an adapter is trained

A folder is written beside its place and renamed; edge.json holds size and digest of each file, so that one
that was cut off later is recognised. No pickle is written or read.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from convert.config import FIELDS, PATHS, TrainConfig, absolute, recorded
from convert.model.lora_adapter import CHECKPOINT_WEIGHTS
from convert.train.fsdp import plain
from convert.train.load_model import dtype_name
from convert.train.trainer import Loop, Progress
from edge.artefact import json_file, manifest
from edge.errors import InputError, UsageError

STATE, OPTIMIZER, RANDOM, WEIGHTS = (
    "trainer_state.json", "optimizer.safetensors", "random.safetensors", CHECKPOINT_WEIGHTS,
)  # fmt: skip
_NAME = re.compile(r"checkpoint-(\d+)")
# Keys that a resumed run may change: they do not decide the weights at a step. All others must be the same.
_FREE = {
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps",
    "output_dir", "dataset_dir", "model_name_or_path", "model_revision", "per_device_eval_batch_size",
    "logging_steps", "plot_loss", "report_to", "save_strategy", "save_steps", "save_total_limit",
    "save_only_model", "resume_from_checkpoint", "eval_strategy", "eval_steps", "eval_answers",
    "early_stopping_steps", "load_best_model_at_end", "ignore_memory", "strict", "template", "dataset",
    "eval_dataset", "use_cpu", "fsdp", "cache_dir", "overwrite_output_dir", "ddp_timeout", "do_train",
    "do_predict", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty",
    "export_dir", "export_size", "infer_dtype", "run_name", "project", "use_swanlab", "swanlab_project",
    "swanlab_workspace", "swanlab_run_name", "swanlab_mode", "swanlab_logdir", "deepspeed",
    "compute_accuracy", "tokenized_path",
}  # fmt: skip


@dataclass
class Best:
    """The evaluation with the lowest loss so far. folder: its checkpoint. waited: evaluations since."""

    loss: float = float("inf")
    step: int = 0
    folder: str = ""
    waited: int = 0


@dataclass
class Checkpoint:
    """A whole checkpoint. passed: why newer ones are not whole; broken: their folders."""

    folder: Path
    step: int
    state: dict[str, Any]
    settings: dict[str, Any]
    passed: list[str] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)


def folder_of(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def listed(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what is named like a checkpoint in `run`, the oldest first."""
    folders = []
    for path in run.iterdir() if run.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            folders.append((int(match[1]), path))
    return sorted(folders)


def save(loop: Loop, run: Path, *, data: str, base: dict[str, Any], best: Best) -> Path:
    """Write run/checkpoint-STEP, whose path is returned; one that stands there already is replaced.

    data: digest of what is trained on. base: base_model and parents, for the manifest.
    """
    config = loop.config
    compute = {"device": loop.device, "compute_dtype": dtype_name(loop.dtype)}
    target = folder_of(run, loop.state.step)
    weights = {name: weight.detach().contiguous().cpu() for name, weight in _trained(loop.model).items()}
    # Adam keeps two numbers for each weight.
    manifest.check_free(
        run, (1 if config.save_only_model else 3) * sum(weight.nbytes for weight in weights.values())
    )
    with manifest.publish(target, overwrite=True) as partial:
        save_file(weights, partial / WEIGHTS)
        for adapter in getattr(loop.model, "peft_config", {}).values():
            adapter.save_pretrained(partial)  # what `edge export lora` needs beside the weights
        if not config.save_only_model:
            tensors, scalars = _flat(loop.optimizer.state_dict()["state"])
            save_file(tensors, partial / OPTIMIZER, metadata={"scalars": json.dumps(scalars)})
            save_file(loop.random, partial / RANDOM)
        json_file.write(partial / STATE, {**summary(loop.state, best), "scaler": loop.scaler.state_dict()})
        manifest.write(
            partial,
            manifest.Manifest(
                stage="checkpoint",
                name=f"{run.absolute().name}, step {loop.state.step}",
                **base,
                settings={**_deciding(config), **compute, "data": data, "processes": loop.world.shares},
                versions=manifest.versions("torch", "transformers", "peft", "bitsandbytes"),
            ),
        )
    return target


def summary(state: Progress, best: Best) -> dict[str, Any]:
    """trainer_state.json, with the names that transformers' Trainer uses."""
    return {
        "global_step": state.step,
        "max_steps": state.total,
        "epoch": state.epoch,
        "best_metric": best.loss if best.step else None,
        "best_global_step": best.step or None,
        "best_model_checkpoint": best.folder or None,
        "evaluations_since_best": best.waited,
        "total_tokens": state.tokens,
        "train_runtime": state.seconds,
        "first_step_runtime": state.first,
        "smoothed_loss": state.smooth,
        "log_history": state.history,
    }


def find(run: Path, wanted: str) -> Checkpoint:
    """The checkpoint to resume from: the last whole one of `run` ("auto"), or the folder `wanted`.

    Raises InputError where there is none, with what is wrong with those that there are.
    """
    folders = [(0, Path(wanted))] if wanted != "auto" else list(reversed(listed(run)))
    passed: list[str] = []
    for number, (_, folder) in enumerate(folders):
        try:
            resumed = _read(folder)
        except InputError as error:
            passed.append(error.message)
        else:
            resumed.passed, resumed.broken = passed, [one for _, one in folders[:number]]
            return resumed
    if not passed:
        raise InputError(f"{run} holds no checkpoint to go on from", "train without --resume")
    raise InputError("no checkpoint can be used: " + "; ".join(passed), "train anew: --overwrite")


def _read(folder: Path) -> Checkpoint:
    about = manifest.read(folder)
    if about.stage != "checkpoint":
        raise InputError(f"{folder} is no checkpoint, but a folder of stage {about.stage}")
    for name, entry in about.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != entry["size"]:
            state = "is missing" if size < 0 else f"has {size:,} bytes of {entry['size']:,}"
            raise InputError(f"{folder.name} is not whole: {name} {state}")
        if manifest.file_digest(path) != entry["sha256"]:
            raise InputError(f"{folder.name} is not whole: {name} was changed after it was written")
    if OPTIMIZER not in about.files:
        raise InputError(
            f"{folder.name} has no {OPTIMIZER} (save_only_model): training cannot be resumed from it"
        )
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(folder, int(state["global_step"]), state, about.settings)


def check_same(resumed: Checkpoint, config: TrainConfig, *, data: str) -> list[str]:
    """Notes on changed keys that are allowed. Raises UsageError for those that would make it another run."""
    now = {**_deciding(config), "data": data}
    name = resumed.folder.name
    if resumed.settings.get("data") != data:
        raise UsageError(
            f"the rows are not those of {name}: data, tokenizer, template or the order of rows was changed",
            "put them back, or train anew: --overwrite",
        )
    for key, value in now.items():
        # A key that is newer than the checkpoint had its default.
        before = resumed.settings.get(key, FIELDS[key].default if key in FIELDS else None)
        if key in PATHS:
            before = absolute(before)
        if key not in _FREE and before != value and before != _plain(value):
            raise UsageError(
                f"{key} is {value!r}, {name} was trained with {before!r}: that is another run",
                f"give {key}={before}, or train anew: --overwrite",
            )
    changed = [
        f"{key} {resumed.settings[key]} is now {_plain(value)}"
        for key, value in now.items()
        if key in ("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio")
        and resumed.settings.get(key) != _plain(value)
    ]
    return [f"{'; '.join(changed)}: the steps to come follow the new schedule"] if changed else []


def restore(loop: Loop, resumed: Checkpoint) -> Best:
    """Put weights, optimizer, random numbers and progress of `resumed` into `loop`.

    Returns its best evaluation. Raises InputError where they do not fit the model.
    """
    load_weights(loop.model, resumed.folder)
    try:
        tensors = load_file(resumed.folder / OPTIMIZER)
        with safe_open(resumed.folder / OPTIMIZER, framework="pt") as file:
            scalars = json.loads(file.metadata()["scalars"])
        state = loop.optimizer.state_dict()
        state["state"] = _deep(tensors, scalars)
        loop.optimizer.load_state_dict(state)
        loop.random = load_file(resumed.folder / RANDOM)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"{resumed.folder} does not fit this model: {error}", "train anew: --overwrite"
        ) from error
    if resumed.state["scaler"]:
        loop.scaler.load_state_dict(resumed.state["scaler"])
    progress, state = loop.state, resumed.state
    progress.step, progress.epoch, progress.tokens = resumed.step, state["epoch"], state["total_tokens"]
    progress.seconds, progress.first = state["train_runtime"], state["first_step_runtime"]
    progress.smooth, progress.history = state["smoothed_loss"], state["log_history"]
    losses = [line["loss"] for line in progress.history if "loss" in line]
    progress.loss = losses[-1] if losses else progress.smooth
    if not state["best_global_step"]:
        return Best()
    return Best(
        state["best_metric"],
        state["best_global_step"],
        state["best_model_checkpoint"] or "",
        state["evaluations_since_best"],
    )


def load_weights(model: Any, folder: Path) -> None:
    """Put the trained weights of a checkpoint into `model`. Raises InputError where they do not fit it."""
    tensors = load_file(folder / WEIGHTS)
    parameters = _trained(model)
    if set(tensors) != set(parameters):
        raise InputError(f"{folder} does not fit this model", "train anew: --overwrite")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise InputError(f"{folder} does not fit this model: {name}", "train anew: --overwrite")
            parameter.copy_(tensors[name])


def set_aside(resumed: Checkpoint) -> None:
    """Rename the newer checkpoints that are not whole, so that new ones can take their places."""
    for folder in resumed.broken:
        aside = folder.with_name(f"broken-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def prune(run: Path, keep: int | None, best: Best) -> None:
    """Remove the oldest checkpoints beyond `keep`; the best one stays."""
    if keep is None:
        return
    folders = [
        folder for _, folder in listed(run) if folder.name != Path(best.folder).name or not best.folder
    ]
    for folder in folders[: max(0, len(folders) - keep)]:
        shutil.rmtree(folder, ignore_errors=True)


def remove_all(run: Path) -> None:
    """Remove the checkpoints of an earlier run; folders that are not ours stay."""
    for _, folder in listed(run):
        if (folder / manifest.FILE).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {plain(name): weight for name, weight in model.named_parameters() if weight.requires_grad}


def _flat(state: dict[int, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as (tensors, plain values), both by "number of the parameter.name"."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for number, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{key}"] = value.detach().contiguous().cpu()
            else:
                scalars[f"{number}.{key}"] = value
    return tensors, scalars


def _deep(tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *scalars.items()):
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    return state


def _deciding(config: TrainConfig) -> dict[str, Any]:
    return {name: _plain(value) for name, value in recorded(config).items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
