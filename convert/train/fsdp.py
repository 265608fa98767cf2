"""The frozen weights of a model spread over the processes that train its adapter: torch's FSDP, full shards.

Each process keeps its part of every decoder layer's weights; a layer is gathered when it computes, forward
and backward, and let go of afterwards. What is trained is a percent of the model: every process has all of
it, and gradients are summed as ever, so that checkpoints and results are those of a run without this. The
scales of 4-bit blocks, embeddings and output head are not spread.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from convert.config import TrainConfig
from convert.train.cuda_graphs import decoder
from convert.train.distributed import World
from edge.errors import UsageError

# What FSDP puts into the names of the parameters below it.
_WRAPPED = "_fsdp_wrapped_module."


def asked(config: TrainConfig, world: World) -> bool:
    """Whether weights are to be spread: by the key, or by what `accelerate launch` was configured for.

    Raises UsageError where there is one process alone, or what is trained is no adapter.
    """
    if not config.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
        return False
    if world.size == 1:
        raise UsageError(
            "fsdp spreads weights over several processes, and this is one",
            "torchrun --nproc-per-node 2 -m edge.cli train CONFIG.yaml",
        )
    if config.finetuning_type == "full" or config.use_dora or config.pissa_init:
        raise UsageError(
            "fsdp spreads the frozen weights under a LoRA adapter",
            "leave out finetuning_type: full, use_dora and pissa_init",
        )
    return True


def layers(model: Any) -> Any:
    """The decoder layers of a causal model, with or without an adapter."""
    return decoder(model).layers


def shard(model: Any, device: str) -> None:
    """Take an adapted model from the system's memory to `device`, its layers' frozen weights in parts."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    where = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)

    def wrapped(module: Any, kept: list[Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FullyShardedDataParallel(
                module,
                sharding_strategy=ShardingStrategy.FULL_SHARD,
                # One layer at a time: another one gathered in advance would double what it takes.
                backward_prefetch=None,
                ignored_states=kept,
                device_id=where,
            )

    whole = layers(model)
    for at, layer in enumerate(whole):
        layer.to(device)
        whole[at] = wrapped(layer, [one for one in layer.parameters() if one.requires_grad])
    model.to(device)
    # An outermost one does not let go of what it gathered: one around them all, with nothing of its own.
    body = decoder(model)
    inside = {id(one) for layer in whole for one in layer.parameters()}
    trained = [one for one in body.parameters() if one.requires_grad]
    kept = [one for one in body.parameters() if id(one) not in inside]
    _put(model, wrapped(body, [*trained, *kept]))


def unshard(model: Any) -> None:
    """Put the layers back as they were, but for their frozen weights, to save the adapter as ever."""
    _put(model, decoder(model).module)
    whole = layers(model)
    for at, layer in enumerate(whole):
        whole[at] = layer.module


def _put(model: Any, body: Any) -> None:
    whole = model.get_base_model()
    setattr(whole, whole.base_model_prefix, body)


def plain(name: str) -> str:
    """The name of a parameter as it is in a model that is not spread."""
    return name.replace(_WRAPPED, "")
