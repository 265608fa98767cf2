"""The frozen weights of a model sharded over the processes that train its adapter: torch's FSDP, full shards.

Each process keeps its shard of every decoder layer's weights; a layer is gathered to compute, forward and
backward, and freed afterwards. What is trained is a percent of the model: every process has all of it, and
gradients are summed as without FSDP, so that checkpoints and results are the same. The scales of 4-bit
blocks, embeddings and output head are not sharded.
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

# What FSDP puts into the names of its parameters.
_WRAPPED = "_fsdp_wrapped_module."


def asked(config: TrainConfig, world: World) -> bool:
    """Whether weights are to be sharded: by the key, or as `accelerate launch` was configured.

    Raises UsageError where there is only one process, or what is trained is no plain adapter.
    """
    if not config.fsdp and os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
        return False
    if world.size == 1:
        raise UsageError(
            "fsdp shards weights over several processes, and this is one",
            "torchrun --nproc-per-node 2 -m edge.cli train CONFIG.yaml",
        )
    if config.whole or config.use_dora or config.pissa_init or config.quantization_bit == 8:
        raise UsageError(
            "fsdp shards the frozen weights under a LoRA adapter",
            "leave out finetuning_type: full (or freeze), use_dora, pissa_init and quantization_bit: 8",
        )
    return True


def layers(model: Any) -> Any:
    """The decoder layers of a causal model, with or without an adapter."""
    return decoder(model).layers


def shard(model: Any, device: str) -> None:
    """Move an adapted model from the system's memory to `device`, its layers' frozen weights as shards."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    device_id = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)

    def wrapped(module: Any, ignored: list[Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FullyShardedDataParallel(
                module,
                sharding_strategy=ShardingStrategy.FULL_SHARD,
                # One layer at a time: prefetching another one would double the memory.
                backward_prefetch=None,
                ignored_states=ignored,
                device_id=device_id,
            )

    stack = layers(model)
    for index, layer in enumerate(stack):
        layer.to(device)
        stack[index] = wrapped(layer, [weight for weight in layer.parameters() if weight.requires_grad])
    model.to(device)
    # The outermost FSDP module never frees what it gathered: one around all layers, with nothing of its own.
    body = decoder(model)
    inside = {id(weight) for layer in stack for weight in layer.parameters()}
    ignored = [weight for weight in body.parameters() if weight.requires_grad or id(weight) not in inside]
    _replace(model, wrapped(body, ignored))


def unshard(model: Any) -> None:
    """Undo the wrapping, but for the frozen weights, so that the adapter is saved as without it."""
    _replace(model, decoder(model).module)
    stack = layers(model)
    for index, layer in enumerate(stack):
        stack[index] = layer.module


def _replace(model: Any, body: Any) -> None:
    whole = model.get_base_model()
    setattr(whole, whole.base_model_prefix, body)


def plain(name: str) -> str:
    """The name of a parameter in a model that is not sharded."""
    return name.replace(_WRAPPED, "")
