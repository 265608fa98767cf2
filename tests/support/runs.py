"""What tests of training runs share: rows and pairs for a toy, and configurations over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.config import TrainConfig, parse

ROWS = [{"instruction": f"question {n} " * (1 + n % 3), "output": f"answer {n}."} for n in range(10)]
PAIRS = [{"instruction": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}!"} for n in range(8)]


def configure(folder: Path, base: Path, **keys: Any) -> Callable[..., TrainConfig]:
    """Write the data sets d (rows) and p (pairs) to `folder`; returns what makes a configuration of a run.

    The run is called `name`; `keys` hold for all of them, and give way to what a test changes.
    """
    (folder / "d.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (folder / "p.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    info = {"d": {"file_name": "d.json"}, "p": {"file_name": "p.json", "ranking": True}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")

    def config(name: str = "run", **changes: Any) -> TrainConfig:
        return parse(
            {
                "model_name_or_path": str(base),
                "dataset": "d",
                "dataset_dir": str(folder),
                "output_dir": str(folder / name),
                "use_cpu": True,
                "per_device_train_batch_size": 2,
                "learning_rate": 5e-3,
                "logging_steps": 1,
                "disable_gradient_checkpointing": True,
                **keys,
                **changes,
            }
        )

    return config
