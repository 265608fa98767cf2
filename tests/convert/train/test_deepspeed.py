"""DeepSpeed's JSON: what it becomes over one process and several, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convert.config import TrainConfig, parse
from convert.train import deepspeed
from convert.train.distributed import World
from edge.errors import InputError, UsageError
from tests.convert.test_config import NEEDED

# As LLaMA-Factory's ds_z*_config.json have them: "auto" wherever the trainer knows better.
AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": "auto"},
}


def config(folder: Path, stage: int, keys: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    path = folder / f"ds_z{stage}_config.json"
    given = {**AUTO, "zero_optimization": {"stage": stage, **changes.pop("zero", {})}, **(keys or {})}
    path.write_text(json.dumps(given), encoding="utf-8")
    return parse({**NEEDED, "deepspeed": str(path), **changes})


@pytest.mark.parametrize(
    ("stage", "processes", "fsdp", "note"),
    [
        (0, 2, None, "gradients are summed over the processes"),
        (2, 2, None, "the optimizer's states are not sharded"),
        (3, 2, "full_shard", "the frozen weights are sharded by FSDP"),
        (3, 1, None, "shards nothing over one process"),
    ],
)
def test_stages(tmp_path: Path, stage: int, processes: int, fsdp: str | None, note: str) -> None:
    changed, notes = deepspeed.mapped(config(tmp_path, stage), World(size=processes))
    assert changed.fsdp == fsdp and changed.deepspeed is None and note in notes[0]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"stage": 3, "finetuning_type": "full"}, "weights that are trained are not sharded"),
        ({"stage": 3, "zero": {"offload_param": {"device": "cpu"}}}, "offload_param moves"),
        ({"stage": 2, "keys": {"tensor_parallel": {"autotp_size": 2}}}, "tensor_parallel is not supported"),
        ({"stage": 2, "keys": {"gradient_accumulation_steps": 3}}, "is 3, the configuration says 1"),
        ({"stage": 5}, "no stage from 0 to 3"),
    ],
)
def test_what_would_train_otherwise_is_refused(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        deepspeed.mapped(config(tmp_path, **how), World(size=2))


def test_no_file_says_what_to_write(tmp_path: Path) -> None:
    given = parse({**NEEDED, "deepspeed": "examples/deepspeed/ds_z3_config.json"})
    with pytest.raises(InputError, match=r"(?s)no such file.*fsdp: full_shard"):
        deepspeed.mapped(given, World())
    assert deepspeed.mapped(parse(NEEDED), World()) == (parse(NEEDED), [])
