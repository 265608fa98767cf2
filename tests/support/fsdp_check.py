"""Run by torchrun, two processes: how many layers' weights are whole at a time. Prints the most on rank 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from convert.config import TrainConfig
from convert.train import distributed, fsdp, load_model


def main(folder: str) -> None:
    world = distributed.join(cpu=True)
    place = load_model.Place("cpu", torch.float32, True)
    config = TrainConfig(model_name_or_path=folder, dataset=("d",), output_dir="o")
    made = load_model.add_adapter(load_model.load_model(Path(folder), place, sharded=True), config)
    alone = sum(one.nbytes for one in fsdp.layers(made).parameters() if not one.requires_grad)
    fsdp.shard(made, "cpu")
    whole = fsdp.layers(made)
    most = 0

    def gathered() -> int:
        flat = [layer._handle.flat_param for layer in whole]
        return sum(one._full_param_padded.untyped_storage().size() > 0 for one in flat)

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, gathered())

    for layer in whole:
        layer.module.register_forward_hook(look)
        layer.module.register_full_backward_hook(look)
    made.train()
    for _ in range(2):
        made(input_ids=torch.arange(40)[None], use_cache=False).logits.sum().backward()
    part = sum(layer._handle.flat_param._local_shard.nbytes for layer in whole)
    if world.first:
        sys.stdout.write(
            f"{len(whole)} layers, {most} at a time, {gathered()} left, {part / alone:.2f} held\n"
        )
    distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1])
