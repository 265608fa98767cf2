"""Several processes, started as LLaMA-Factory starts them: FORCE_TORCHRUN and the variables beside it."""

from __future__ import annotations

import os
import subprocess
import sys

from edge.machine.hardware import free_port
from edge.progress import stdout_of_child


def is_asked() -> bool:
    """Whether FORCE_TORCHRUN asks for processes, and this is none of them yet."""
    return os.environ.get("FORCE_TORCHRUN", "0").lower() in ("true", "y", "1") and "RANK" not in os.environ


def command(argv: list[str]) -> list[str]:
    """The command that starts `edge train ARGV` on this machine's GPUs, or on those of NNODES machines.

    Without GPUs it is one process. NPROC_PER_NODE, NODE_RANK, MASTER_ADDR and MASTER_PORT say the rest.
    """
    import torch

    settings = {
        "--nnodes": os.environ.get("NNODES", "1"),
        "--node-rank": os.environ.get("NODE_RANK", "0"),
        "--nproc-per-node": os.environ.get("NPROC_PER_NODE", str(max(1, torch.cuda.device_count()))),
        "--master-addr": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "--master-port": os.environ.get("MASTER_PORT") or str(free_port()),
    }
    options = [word for pair in settings.items() for word in pair]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "edge.cli", "train", *argv]


def launch(argv: list[str]) -> int:
    """Run `command` to its end; its exit code."""
    return subprocess.run(command(argv), stdout=stdout_of_child(), check=False).returncode
