"""Checkpoints: everything that decides how training goes on, written whole or not at all.

    RUN/checkpoint-N/   weights, optimizer.safetensors, random.safetensors, trainer_state.json, edge.json

A folder is written beside its name and renamed; edge.json holds size and digest of each file, so that one
that was cut off later is known for what it is. No pickle is written or read.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from convert.config import FIELDS, TrainConfig
from convert.train.fsdp import plain
from convert.train.load_model import dtype_name
from convert.train.trainer import Loop, Progress
from edge.artefact import manifest
from edge.errors import InputError, UsageError

STATE, OPTIMIZER, RANDOM, WEIGHTS = (
    "trainer_state.json", "optimizer.safetensors", "random.safetensors", "trained.safetensors",
)  # fmt: skip
_NAME = re.compile(r"checkpoint-(\d+)")
# Keys that do not decide the way of a run up to a step; all others must be as they were.
_FREE = {
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps",
    "output_dir", "dataset_dir", "model_name_or_path", "model_revision", "per_device_eval_batch_size",
    "logging_steps", "plot_loss", "report_to", "save_strategy", "save_steps", "save_total_limit",
    "save_only_model", "resume_from_checkpoint", "eval_strategy", "eval_steps", "eval_answers",
    "early_stopping_steps", "load_best_model_at_end", "ignore_memory", "strict", "template", "dataset",
    "eval_dataset", "use_cpu", "fsdp",
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
    found = []
    for one in run.iterdir() if run.is_dir() else ():
        match = _NAME.fullmatch(one.name)
        if match and one.is_dir():
            found.append((int(match[1]), one))
    return sorted(found)


def save(loop: Loop, run: Path, *, data: str, base: dict[str, Any], best: Best) -> Path:
    """Write run/checkpoint-STEP, whose path is returned; one that stands there already is replaced.

    data: digest of what is trained on. base: base_model and parents, for the manifest.
    """
    config = loop.config
    compute = {"device": loop.device, "compute_dtype": dtype_name(loop.dtype)}
    target = folder_of(run, loop.state.step)
    weights = {name: one.detach().contiguous().cpu() for name, one in _trained(loop.model).items()}
    # Adam keeps two numbers for each weight.
    manifest.check_free(
        run, (1 if config.save_only_model else 3) * sum(one.nbytes for one in weights.values())
    )
    with manifest.publish(target, overwrite=True) as partial:
        save_file(weights, partial / WEIGHTS)
        if not config.save_only_model:
            tensors, scalars = _flat(loop.optimizer.state_dict()["state"])
            save_file(tensors, partial / OPTIMIZER, metadata={"scalars": json.dumps(scalars)})
            save_file(loop.random, partial / RANDOM)
        (partial / STATE).write_text(
            json.dumps({**summary(loop.state, best), "scaler": loop.scaler.state_dict()}, indent=2) + "\n",
            encoding="utf-8",
        )
        manifest.write(
            partial,
            manifest.Manifest(
                stage="checkpoint",
                name=f"{run.absolute().name}, step {loop.state.step}",
                **base,
                settings={**_deciding(config), **compute, "data": data, "processes": loop.world.size},
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
    """The checkpoint to go on from: the last whole one of `run` ("auto"), or the folder `wanted`.

    Raises InputError where there is none, with what is wrong with those that there are.
    """
    folders = [(0, Path(wanted))] if wanted != "auto" else list(reversed(listed(run)))
    passed: list[str] = []
    for number, (_, folder) in enumerate(folders):
        try:
            found = _read(folder)
        except InputError as error:
            passed.append(error.message)
        else:
            found.passed, found.broken = passed, [one for _, one in folders[:number]]
            return found
    if not passed:
        raise InputError(f"{run} holds no checkpoint to go on from", "train without --resume")
    raise InputError("no checkpoint can be used: " + "; ".join(passed), "train anew: --overwrite")


def _read(folder: Path) -> Checkpoint:
    known = manifest.read(folder)
    if known.stage != "checkpoint":
        raise InputError(f"{folder} is no checkpoint, but a folder of stage {known.stage}")
    for name, entry in known.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != entry["size"]:
            state = "is missing" if size < 0 else f"has {size:,} bytes of {entry['size']:,}"
            raise InputError(f"{folder.name} is not whole: {name} {state}")
        if manifest.file_digest(path) != entry["sha256"]:
            raise InputError(f"{folder.name} is not whole: {name} was changed after it was written")
    if OPTIMIZER not in known.files:
        raise InputError(
            f"{folder.name} has no {OPTIMIZER} (save_only_model): its way cannot be gone on with"
        )
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(folder, int(state["global_step"]), state, known.settings)


def check_same(found: Checkpoint, config: TrainConfig, *, data: str, processes: int) -> list[str]:
    """Notes on keys that differ and may. Raises UsageError for those that make it another run."""
    now = {**_deciding(config), "data": data, "processes": processes}
    name = found.folder.name
    if found.settings.get("data") != data:
        raise UsageError(
            f"the rows are not those of {name}: data, tokenizer, template or the order of rows was changed",
            "put them back, or train anew: --overwrite",
        )
    for key, value in now.items():
        # A key that is younger than the checkpoint was as it is by default.
        before = found.settings.get(key, FIELDS[key].default if key in FIELDS else None)
        if key not in _FREE and before != value and before != _plain(value):
            raise UsageError(
                f"{key} is {value!r}, {name} was trained with {before!r}: that is another run",
                f"give {key}={before}, or train anew: --overwrite",
            )
    changed = [
        f"{key} {found.settings[key]} is now {_plain(value)}"
        for key, value in now.items()
        if key in ("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio")
        and found.settings.get(key) != _plain(value)
    ]
    return [f"{'; '.join(changed)}: the steps to come follow the new schedule"] if changed else []


def restore(loop: Loop, found: Checkpoint) -> Best:
    """Put weights, optimizer, random numbers and progress of `found` into `loop`.

    Returns its best evaluation. Raises InputError where they do not fit the model.
    """
    load_weights(loop.model, found.folder)
    try:
        tensors = load_file(found.folder / OPTIMIZER)
        with (found.folder / OPTIMIZER).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        scalars = json.loads(header["__metadata__"]["scalars"])
        state = loop.optimizer.state_dict()
        state["state"] = _deep(tensors, scalars)
        loop.optimizer.load_state_dict(state)
        loop.random = load_file(found.folder / RANDOM)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"{found.folder} does not fit this model: {error}", "train anew: --overwrite"
        ) from error
    loop.scaler.load_state_dict(found.state["scaler"]) if found.state["scaler"] else None
    made, state = loop.state, found.state
    made.step, made.epoch, made.tokens = found.step, state["epoch"], state["total_tokens"]
    made.seconds, made.first = state["train_runtime"], state["first_step_runtime"]
    made.smooth, made.history = state["smoothed_loss"], state["log_history"]
    last = next((one for one in reversed(made.history) if "loss" in one), None)
    made.loss = last["loss"] if last else made.smooth
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
        for name, one in parameters.items():
            if one.shape != tensors[name].shape:
                raise InputError(f"{folder} does not fit this model: {name}", "train anew: --overwrite")
            one.copy_(tensors[name])


def set_aside(found: Checkpoint) -> None:
    """Rename the newer checkpoints that are not whole, so that new ones can take their places."""
    for folder in found.broken:
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
    return {plain(name): one for name, one in model.named_parameters() if one.requires_grad}


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
    return {name: _plain(value) for name, value in dataclasses.asdict(config).items() if name in FIELDS}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
