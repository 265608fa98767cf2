"""Several processes train as one that accumulates, also where they hold the frozen weights together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from convert.config import as_yaml
from convert.train import cli, finetune, fsdp
from convert.train.distributed import World
from edge.artefact import manifest
from edge.errors import UsageError
from edge.machine.hardware import free_port
from tests.support.matrix import few
from tests.support.runs import configure
from tests.support.toy import make_model

# Seconds of training: left out of the quick part.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
QUIET = Console(quiet=True)


@pytest.fixture
def made(tmp_path, base):
    return configure(tmp_path, base, max_steps=2, save_strategy="no")


def two_processes(*what):
    """A module by torchrun, over gloo."""
    options = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, "-m", *what],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=240,
    )


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", few([None, "full_shard"], ["full_shard"]))
def test_two_processes_train_as_one_that_accumulates(made, tmp_path, fsdp, monkeypatch, capfd):
    """The same gradients, the same weights; also where the processes hold the frozen weights together.

    Started as LLaMA-Factory starts them, by FORCE_TORCHRUN.
    """
    # Three batches an epoch: in each second step one process has none.
    more = {"val_size": 2, "max_steps": 4, "max_samples": 8, "quantization_bit": 4}
    more["disable_gradient_checkpointing"] = fsdp is None
    one = finetune.run(made("one", gradient_accumulation_steps=2, **more), console=QUIET)
    path = tmp_path / "c.yaml"
    path.write_text(as_yaml(made("two", fsdp=fsdp, **more)), encoding="utf-8")
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    capfd.readouterr()
    code = cli.main([str(path)])
    said, errors = capfd.readouterr()
    assert code == 0, errors
    assert ("sharded over 2 processes" if fsdp else "on each of 2 processes") in said
    assert said.count("step 4/4") == 1 and " -> " in said
    first, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    )
    assert set(first) == set(second)
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-5), name
    logs = [
        [json.loads(line) for line in (tmp_path / name / "trainer_log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for line, other in zip(*logs, strict=True):
        for key in ("loss", "eval_loss", "total_tokens"):
            assert line.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-4)
    assert one.is_dir()
    about = [manifest.read(tmp_path / name / "adapter").settings["processes"] for name in ("one", "two")]
    assert about == [1, 2]


@pytest.mark.matrix
@pytest.mark.slow
def test_spread_weights_are_whole_one_layer_at_a_time(tmp_path):
    folder = make_model(tmp_path / "m", layers=5)
    done = two_processes("tests.support.fsdp_check", str(folder))
    assert done.returncode == 0, done.stderr.decode("utf-8")
    assert re.search(r"5 layers, 1 at a time, 0 left, 0\.5\d held", done.stdout.decode("utf-8"))


def test_spread_weights_want_several_processes_and_an_adapter(made, monkeypatch):
    with pytest.raises(UsageError, match="this is one") as caught:
        finetune.run(made(fsdp="full_shard"), console=QUIET)
    assert "torchrun" in caught.value.hint
    # What `accelerate launch` sets where it was configured so.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert fsdp.asked(made(), World(0, 2))
    for more in ({"use_dora": True}, {"finetuning_type": "full", "quantization_bit": None}):
        with pytest.raises(UsageError, match="under a LoRA adapter"):
            fsdp.asked(made(**more), World(0, 2))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert not fsdp.asked(made(), World(0, 2))


def test_who_has_a_batch_less_computes_one_that_does_not_count():
    batches = ["a", "b", "c"]
    assert World(1, 2).share(batches) == [("b", True)]
    assert World(1, 2, sharded=True).share(batches) == [("b", True), ("a", False)]
    assert World(0, 2, sharded=True).share(batches) == [("a", True), ("c", True)]
    assert World(1, 2, sharded=True).share(["a", "b"]) == [("b", True)]
    assert World(2, 3, sharded=True).share(["a"]) == [("a", False)]
