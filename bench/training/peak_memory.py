"""The most memory that training holds, in a process that does nothing else.

    python -m bench.training.peak_memory CONFIG.yaml [key=value ...]

Says what `edge train` says, with the estimate of memory, and at the end `peak: N GiB`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from convert.config import TrainConfig, load_train_config
from edge.console import guarded


def peak(config: TrainConfig, console: Console) -> None:
    """Train as `config` says; print the most memory that this process, or its card, held meanwhile, in GiB.

    Counted from the first step on where the system can forget what was before it (Linux and CUDA).
    """
    import torch

    from convert.train import finetune, trainer

    real = trainer.Loop.run
    card = torch.cuda.is_available() and not config.use_cpu
    here = Path("/proc/self")

    def run(self: trainer.Loop, *args: Any, **more: Any) -> Any:
        if card:
            torch.cuda.reset_peak_memory_stats()
        elif here.is_dir():
            (here / "clear_refs").write_text("5", encoding="utf-8")
        return real(self, *args, **more)

    trainer.Loop.run = run  # type: ignore[method-assign]
    finetune.run(config, console=console)
    if card:
        most = torch.cuda.max_memory_allocated() / 2**30
    elif here.is_dir():
        status = (here / "status").read_text(encoding="utf-8")
        most = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20
    else:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        most = used / (2**30 if sys.platform == "darwin" else 2**20)
    console.print(f"peak: {most:.3f} GiB")


def main(argv: list[str]) -> int:
    path, *overrides = argv
    peak(load_train_config(Path(path), overrides), Console(highlight=False, markup=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
