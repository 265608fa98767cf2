"""Several nodes, as processes of this machine: one is lost, lacks something, or is configured otherwise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from convert import merge
from convert.config import as_yaml
from convert.train import checkpoint, finetune
from edge.artefact import manifest
from edge.machine.hardware import free_port
from tests.support.matrix import few
from tests.support.runs import configure

# Seconds of training: left out of the quick part.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
QUIET = Console(quiet=True)
Start = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def start(tmp_path: Path):
    """Start `edge train` as the processes of two nodes, each with its configuration, as torchrun would."""
    processes: list[subprocess.Popen[str]] = []

    def nodes(*configs: Path, more: tuple[str, ...] = ()) -> list[subprocess.Popen[str]]:
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        for rank, path in enumerate(configs):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "edge.cli", "train", str(path), *more],
                    env={**os.environ, **group, "PYTHONPATH": str(ROOT), "RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                )
            )
        return processes[-len(configs) :]

    yield nodes
    for process in processes:
        process.kill()
        process.communicate()


def written(path: Path, config) -> Path:
    path.write_text(as_yaml(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("lost", few([1, 0], [1]))
def test_a_lost_node_ends_the_others_and_one_process_goes_on(start: Start, tmp_path, base, lost: int) -> None:
    made = configure(tmp_path, base, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    config = written(tmp_path / "c.yaml", made("two", max_steps=100_000, save_total_limit=3))
    nodes = start(config, config)
    run = tmp_path / "two"
    until = time.monotonic() + 120
    while not (run / "checkpoint-2").is_dir():
        assert all(node.poll() is None for node in nodes), nodes[0].communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    nodes[lost].kill()
    began = time.monotonic()
    _, errors = nodes[1 - lost].communicate(timeout=60)
    assert time.monotonic() - began < 60 and nodes[1 - lost].returncode == 1
    assert f"error: process {lost} on " in errors and " is gone: " in errors and "--resume" in errors
    assert "Traceback" not in errors

    done = checkpoint.find(run, "auto").step
    adapter = finetune.run(made("two", max_steps=done + 2, resume_from_checkpoint="auto"), console=QUIET)
    assert manifest.read(adapter).settings["steps"] == done + 2
    # The steps are those of one process that was never stopped and accumulates two micro-batches.
    alone = finetune.run(made("one", max_steps=done + 2, gradient_accumulation_steps=2), console=QUIET)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, alone))
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-2, atol=1e-4), name
    assert merge.main([str(run)]) == 0 and (run / "merged" / manifest.FILE).is_file()


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (
            {"learning_rate": 4e-3},
            ["process 1 on .* differs .*: learning_rate is 0.004 and"] * 2,
        ),
        ({"dataset_dir": "nowhere"}, ["process 1 on .* ended: .*nowhere", "error: .*nowhere"]),
        (
            {"output_dir": "elsewhere", "resume_from_checkpoint": "auto"},
            ["process 1 on .* ended: elsewhere holds no checkpoint", "give all one output_dir, or copy"],
        ),
    ],
)
def test_what_a_node_lacks_or_has_otherwise_is_named(
    start: Start, tmp_path, base, change: dict[str, Any], sentences: list[str]
) -> None:
    made = configure(tmp_path, base, max_steps=2)
    same = {key: change[key] for key in change if key == "resume_from_checkpoint"}
    if same:
        finetune.run(made("run", max_steps=1), console=QUIET)
    first = written(tmp_path / "first.yaml", made("run", **same))
    nodes = start(first, written(tmp_path / "second.yaml", made("run", **change)))
    for node, sentence in zip(nodes, sentences, strict=True):
        _, errors = node.communicate(timeout=60)
        assert node.returncode in (1, 2)
        assert re.search(sentence, errors) and "Traceback" not in errors, errors


@pytest.mark.matrix
def test_output_dirs_that_are_not_shared_are_said(start: Start, tmp_path, base) -> None:
    made = configure(tmp_path, base, max_steps=2, save_strategy="no")
    configs = [written(tmp_path / f"{name}.yaml", made(name)) for name in ("here", "there")]
    nodes = start(*configs)
    printed, errors = nodes[0].communicate(timeout=90)
    assert nodes[0].returncode == 0, errors
    assert "not one folder for all processes" in printed and "waiting for 2 processes at 127.0.0.1:" in errors
    assert nodes[1].wait(60) == 0 and not (tmp_path / "there" / "adapter").exists()


@pytest.mark.matrix
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_of_two_processes(tmp_path, base, launcher: str) -> None:
    """The entry of this project under both; a process each for two nodes, and two for one machine."""
    made = configure(tmp_path, base, max_steps=2, save_strategy="no")
    path, port = written(tmp_path / "c.yaml", made("run")), str(free_port())
    if launcher == "torchrun":
        command = [sys.executable, "-m", "edge.cli", "train", str(path)]
        variables = {"FORCE_TORCHRUN": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        rounds = [variables | {"NPROC_PER_NODE": "1", "NODE_RANK": str(rank)} for rank in (0, 1)]
    else:
        options = ["--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--main_process_port", port]
        command = [sys.executable, "-m", "accelerate.commands.launch", *options]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "edge.cli", "train", str(path)]
        rounds = [{}]
    nodes = [
        subprocess.Popen(
            command,
            env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for variables in rounds
    ]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), outputs
    assert "on each of 2 processes" in outputs[0][0]
    assert manifest.read(tmp_path / "run" / "adapter").settings["processes"] == 2
