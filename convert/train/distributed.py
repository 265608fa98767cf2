"""Several processes that train together, started by torchrun: sums over them, over gloo or NCCL.

Each process takes its share of a step's micro-batches and the gradients are added, so that the step is the
same as that of one process which accumulates as many.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from edge.errors import UsageError


@dataclass(frozen=True)
class World:
    """This process, one of `size`; rank 0 writes files and prints.

    sharded: the processes hold the model's weights together, so that all go through its layers as often.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    sharded: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64."""
        if self.size == 1:
            return list(values)
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(sums)
        return [float(value) for value in sums]

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes."""
        if self.size > 1:
            for parameter in parameters:
                distributed.all_reduce(parameter.grad)

    def share(self, batches: list[Any]) -> list[tuple[Any, bool]]:
        """This process' part of `batches`, each with whether it counts: where weights are sharded, those that
        have one less compute the first one without counting it.
        """
        mine = [(batch, True) for batch in batches[self.rank :: self.size]]
        if self.sharded and len(mine) < -(-len(batches) // self.size):
            mine.append((batches[0], False))
        return mine

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()


def join(*, cpu: bool, timeout: int = 1800) -> World:
    """The world that torchrun's variables describe; a single process without them.

    timeout: seconds that a process waits for the others.
    Raises UsageError where there are more processes on this machine than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available() and not cpu
    if cuda:
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} has no GPU: there are {torch.cuda.device_count()}",
                "lower --nproc-per-node",
            )
        torch.cuda.set_device(local)
    if not distributed.is_initialized():
        device = torch.device("cuda", local) if cuda else None
        distributed.init_process_group(
            "nccl" if cuda else "gloo", device_id=device, timeout=datetime.timedelta(seconds=timeout)
        )
    return World(rank, size, local)


def leave() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
