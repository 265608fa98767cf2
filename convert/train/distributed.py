"""Several processes that train together, started by torchrun: sums over them, over gloo or NCCL.

Each process takes its share of a step's micro-batches and the gradients are added, so that the step is the
same as that of one process which accumulates as many.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from convert.train import peers
from edge.errors import EdgeError, UsageError


@dataclass(frozen=True)
class World:
    """This process, one of `size`; rank 0 writes files and prints.

    sharded: the processes hold the model's weights together, so that all go through its layers as often.
    begun: how many processes a resumed run began with. Its steps keep their micro-batches, whoever computes
    them; 0: as many as there are.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    sharded: bool = False
    begun: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def shares(self) -> int:
        """How many times gradient_accumulation_steps micro-batches make a step."""
        return self.begun or self.size

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

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def agree(self, facts: dict[str, Any]) -> None:
        """Raises UsageError, in every process, where one of them has other facts; it names what differs."""
        (first, expected), *others = self.gather((platform.node(), facts))
        for rank, (host, facts_there) in enumerate(others, 1):
            different = [
                f"{name} is {facts_there.get(name)!r} and not {value!r}"
                for name, value in expected.items()
                if facts_there.get(name) != value
            ]
            if different:
                raise UsageError(
                    f"process {rank} on {host} differs from process 0 on {first}: {'; '.join(different[:5])}",
                    "give every node the same versions, configuration, model and data",
                )


@contextlib.contextmanager
def together(*, cpu: bool, timeout: int = 1800) -> Iterator[World]:
    """`join` for the time of the block. An error that ends it ends the other processes too, with its message.

    Where another process ended or is gone, this one ends with that reason and exit code 1.
    """
    world = join(cpu=cpu, timeout=timeout)
    message = "its own output says why"
    try:
        yield world
        message = ""
    except RuntimeError as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        # gloo says that a connection closed; why, the connections to the processes say.
        if world.size > 1 and (reason := _peers[0].reason()):
            leave(message)
            # At once: gloo aborts now and then while Python ends with a connection that was lost.
            peers.exit_now(reason)
        raise
    except EdgeError as error:
        message = error.message
        raise
    finally:
        leave(message)


def join(*, cpu: bool, timeout: int = 1800) -> World:
    """The world that torchrun's variables describe; a single process without them.

    timeout: seconds that a process waits for the others.
    Raises UsageError where there are more processes on this machine than GPUs, EdgeError where the others do
    not come.
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
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if local == 0 and size > int(os.environ.get("LOCAL_WORLD_SIZE", size)):
            sys.stderr.write(f"waiting for {size} processes at {place}\n")
        device = torch.device("cuda", local) if cuda else None
        try:
            distributed.init_process_group(
                "nccl" if cuda else "gloo", device_id=device, timeout=datetime.timedelta(seconds=timeout)
            )
        except RuntimeError as error:
            raise EdgeError(
                f"process {rank} of {size} met no others at {place} in {timeout} s (ddp_timeout): "
                + str(error).splitlines()[0],
                "start the command on every node, with the same MASTER_ADDR, MASTER_PORT and NNODES",
            ) from error
        _peers.append(_watch(rank, size, at_once=cuda))
    return World(rank, size, local)


# Of the group that this process is in, as torch keeps the group itself.
_peers: list[peers.Peers] = []


def _watch(rank: int, size: int, *, at_once: bool) -> peers.Peers:
    """Connect this process with the first one, which listens where MASTER_ADDR says."""
    where: list[Any] = [None]
    if rank == 0:
        server, token = peers.listen()
        where = [(server.getsockname()[1], token, platform.node())]
    distributed.broadcast_object_list(where)
    port, token, host = where[0]
    if rank == 0:
        links = peers.accept(server, token, size - 1)
    else:
        links = [peers.connect((os.environ["MASTER_ADDR"], port), token, rank=rank, host=host)]
    return peers.Peers(links, end=peers.exit_now, at_once=at_once)


def leave(message: str = "") -> None:
    """Leave the group; with the message of the error that ends this process, for the others."""
    while _peers:
        _peers.pop().leave(message)
    # With others that are gone, NCCL may wait for them here.
    if not message and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
