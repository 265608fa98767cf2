"""How long training will take, before its first step: by the speed of an earlier one, or of a few steps.

Speed is tokens per second, so other rows, epochs or batches of the same kind of training are told as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from convert.config import TrainConfig, recorded
from convert.data.encode import Item
from convert.train.trainer import Loop, steps_in_epoch
from edge.artefact import manifest
from edge.errors import InputError
from edge.machine import hardware

# Trainings that differ in any of these have other speeds.
_KIND = (
    "model_name_or_path", "stage", "finetuning_type", "quantization_bit", "per_device_train_batch_size",
    "disable_gradient_checkpointing", "packing", "neat_packing", "use_dora",
)  # fmt: skip
# Steps that are tried; the first one warms up and does not count.
TRIED = 4


def machine(device: str) -> str:
    """What computes: the GPU's name, or the processor's with its threads."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    return f"{hardware.cpu_model()}, {hardware.cpu_threads()} threads"


def kind(config: TrainConfig, device: str, dtype: str, processes: int) -> dict[str, Any]:
    """What a training's speed depends on, as a run records it."""
    keys = recorded(config)
    about = {"device": device, "compute_dtype": dtype, "processes": processes, "machine": machine(device)}
    return {key: keys[key] for key in _KIND} | about


def earlier(folder: Path, wanted: dict[str, Any]) -> tuple[float, Path] | None:
    """(tokens per second, its folder) of the last training of that kind beside the run `folder`."""
    found = []
    for path in folder.absolute().parent.glob(f"*/*/{manifest.FILE}"):
        try:
            about = manifest.read(path.parent)
        except InputError:
            continue
        speed = about.settings.get("tokens_per_second")
        if speed and all(about.settings.get(key) == value for key, value in wanted.items()):
            found.append((about.created, float(speed), path.parent.parent))
    return max(found)[1:] if found else None


def tokens(config: TrainConfig, items: list[Item], steps: int, processes: int) -> int:
    """Tokens that so many steps compute, without padding."""
    epoch = sum(item.tokens for item in items)
    return round(epoch * steps / steps_in_epoch(config, len(items), processes))


def sample(config: TrainConfig, items: list[Item]) -> list[Item]:
    """Rows for TRIED steps, of all lengths."""
    count = TRIED * config.per_device_train_batch_size * config.gradient_accumulation_steps
    order = sorted(items, key=lambda item: item.size)
    return order[:: max(1, len(order) // count)][:count]


def tried(loop: Loop) -> float:
    """Tokens per second of a loop's steps behind the first."""
    done: list[tuple[int, float]] = []
    loop.run(lambda state: done.append((state.tokens, state.seconds)))
    return (done[-1][0] - done[0][0]) / (done[-1][1] - done[0][1])
