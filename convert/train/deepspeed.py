"""DeepSpeed's JSON as LLaMA-Factory's users have it, said in what is here: summed gradients, or FSDP."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.config import TrainConfig
from convert.train.distributed import World
from edge.artefact import json_file
from edge.errors import InputError, UsageError

_HINT = "leave deepspeed out, or change the file"


def mapped(config: TrainConfig, world: World) -> tuple[TrainConfig, list[str]]:
    """`config` without its `deepspeed`, and notes on what takes its place.

    Stages 0 to 2 of ZeRO give the gradients that summing gives; stage 3 shards the weights, as fsdp does.
    Raises InputError for a file that cannot be read, UsageError for what would train otherwise than it says.
    """
    if not config.deepspeed:
        return config, []
    path = Path(config.deepspeed)
    hint = "give the path of the file; ZeRO-3 of an adapter's base is fsdp: full_shard here"
    if not path.is_file():
        raise InputError(f"deepspeed: no such file: {path}", hint)
    given = json_file.read(path, hint=hint)
    for what, todo in _refusals(given, config):
        raise UsageError(f"deepspeed: {path}: {what}", todo)
    stage = (given.get("zero_optimization") or {}).get("stage", 0)
    config = dataclasses.replace(config, deepspeed=None)
    if world.size == 1:
        return config, [f"deepspeed: {path.name} shards nothing over one process"]
    if stage == 3 and config.finetuning_type == "lora":
        config = dataclasses.replace(config, fsdp=config.fsdp or "full_shard")
        return config, [f"deepspeed: {path.name}: the frozen weights are sharded by FSDP"]
    if stage == 3:
        raise UsageError(
            f"deepspeed: {path}: weights that are trained are not sharded",
            "train an adapter (finetuning_type: lora), or take a file of ZeRO stage 0 to 2",
        )
    note = f"deepspeed: {path.name}: gradients are summed over the processes"
    return config, [note + ("; the optimizer's states are not sharded" if stage else "")]


def _refusals(given: dict[str, Any], config: TrainConfig) -> Iterator[tuple[str, str]]:
    zero = given.get("zero_optimization") or {}
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        yield "zero_optimization has no stage from 0 to 3", _HINT
        return
    for key in ("offload_param", "offload_optimizer"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            yield (
                f"{key} moves to the system's memory, which is not done here",
                "quantization_bit: 4 with optim: paged_adamw_8bit takes less of the GPU's",
            )
    for key in ("tensor_parallel", "fp8", "optimizer", "scheduler", "pipeline"):
        if given.get(key):
            yield f"{key} is not supported", _HINT
    ours = {
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_clipping": config.max_grad_norm,
    }
    for key, value in ours.items():
        if given.get(key, "auto") not in ("auto", value):
            yield f"{key} is {given[key]}, the configuration says {value}", "make them the same, or 'auto'"
