"""FORCE_TORCHRUN: the command that LLaMA-Factory's variables stand for."""

from __future__ import annotations

import sys

import pytest

from convert.train import torchrun


def test_their_variables_become_torchruns_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "4", "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert torchrun.command(["x.yaml", "seed=1"]) == [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "1",
        "--nproc-per-node", "4", "--master-addr", "10.0.0.1", "--master-port", "29500",
        "-m", "edge.cli", "train", "x.yaml", "seed=1",
    ]  # fmt: skip


def test_without_them_it_is_one_process_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    words = torchrun.command([])
    options = dict(zip(words[3:13:2], words[4:13:2], strict=True))
    assert int(options.pop("--master-port")) > 0
    assert options == {
        "--nnodes": "1", "--node-rank": "0", "--nproc-per-node": "1", "--master-addr": "127.0.0.1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "asked"),
    [({}, False), ({"FORCE_TORCHRUN": "1"}, True), ({"FORCE_TORCHRUN": "1", "RANK": "0"}, False)],
)
def test_only_the_first_process_starts_others(
    variables: dict[str, str], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert torchrun.is_asked() is asked
