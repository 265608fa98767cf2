"""What it takes to talk to a model, a checkpoint, a merged model or an export."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edge.artefact import json_file
from edge.errors import EdgeError
from edge.jobs import job as jobs
from edge.ui import loaded
from edge.ui.workspace import Workspace

SERVED = ["--slots", "2", "--no-tune", "--port", "0"]


def folder(path: Path, stage: str, digest: str, *files: str, parent: str = "", **settings: Any) -> Path:
    """A stage's folder with its manifest."""
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_text("{}", encoding="utf-8")
    about = {"stage": stage, "digest": digest, "settings": settings, "parents": [{"digest": parent}]}
    (path / "edge.json").write_text(json.dumps(about), encoding="utf-8")
    return path


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    folder(tmp_path / "models" / "base", "model", "m", "config.json")
    run = tmp_path / "runs" / "r"
    folder(run / "adapter", "adapter", "a", "adapter_config.json", model_name_or_path="models/base")
    folder(run / "merged", "merged", "w", "config.json")
    folder(run / "onnx", "onnx", "o", "model.onnx", parent="w")
    (run / "checkpoint-15").mkdir()  # of all weights
    for step in (5, 10):
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}" / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "models/base"}', encoding="utf-8"
        )
    return Workspace(tmp_path)


def test_everything_has_a_name(space: Workspace) -> None:
    parts = ("adapter", "merged", "onnx", "checkpoint-10", "checkpoint-5")
    assert loaded.names(space) == ["models/base", *(f"runs/r/{part}" for part in parts)]


def test_what_is_whole_is_exported_once_and_served(space: Workspace) -> None:
    assert loaded.commands(space, "models/base") == [
        ["export", "gguf", "models/base"],
        ["serve", "models/base/gguf", "--name", "models/base", *SERVED],
    ]
    served = ["serve", "runs/r/gguf", "--name", "runs/r/merged", *SERVED]
    assert loaded.commands(space, "runs/r/merged") == [["export", "gguf", "runs/r"], served]
    made = folder(space.root / "runs" / "r" / "gguf", "gguf", "g", "r.gguf", parent="w")
    assert loaded.commands(space, "runs/r/merged") == [served]
    assert loaded.commands(space, "runs/r/gguf") == [
        ["serve", "runs/r/gguf", "--name", "runs/r/gguf", *SERVED]
    ]
    assert loaded.commands(space, "runs/r/onnx") == [
        ["serve", "runs/r/onnx", "--name", "runs/r/onnx", *SERVED]
    ]
    # Another merge: the file is of the earlier one.
    json_file.write(made / "edge.json", {"parents": [{"digest": "earlier"}]})
    assert loaded.commands(space, "runs/r/merged") == [["export", "gguf", "runs/r", "--overwrite"], served]
    (space.root / "models" / "base" / "b.gguf").touch()
    assert loaded.commands(space, "models/base") == [
        ["serve", "models/base", "--name", "models/base", *SERVED]
    ]


@pytest.mark.parametrize(("part", "owner"), [("adapter", "runs/r"), ("checkpoint-5", "runs/r/checkpoint-5")])
def test_an_adapter_is_put_on_its_base(space: Workspace, part: str, owner: str) -> None:
    name = f"runs/r/{part}"
    base, lora, serve = loaded.commands(space, name)
    assert (base, lora) == (["export", "gguf", "models/base"], ["export", "lora", owner])
    assert serve[:2] == ["serve", "models/base/gguf"]
    folder(space.root / "models" / "base" / "gguf", "gguf", "g", "b.gguf", parent="m")
    folder(space.root / owner / "lora", "lora", "l", "r-lora.gguf", parent="a")
    [serve] = loaded.commands(space, name)
    assert serve == ["serve", "models/base/gguf", "--lora", f"{name}={owner}/lora/r-lora.gguf", *SERVED]
    assert loaded.trained(space, name) == {
        "model_name_or_path": "models/base",
        "adapter_name_or_path": "runs/r",
    }


def test_what_is_gone_is_named(space: Workspace) -> None:
    with pytest.raises(EdgeError, match="no such folder: runs/x/gguf"):
        loaded.commands(space, "runs/x/gguf")
    (space.root / "models" / "base").rename(space.root / "models" / "moved")
    with pytest.raises(EdgeError, match="the base of runs/r/adapter is models/base"):
        loaded.commands(space, "runs/r/adapter")


def test_what_is_trained_further(space: Workspace) -> None:
    adapter = {"model_name_or_path": "models/base", "adapter_name_or_path": "runs/r"}
    assert loaded.trained(space, "models/base") == {"model_name_or_path": "models/base"}
    assert loaded.trained(space, "runs/r/gguf") == loaded.trained(space, "runs/r/adapter") == adapter
    (space.root / "runs" / "r" / "adapter").rename(space.root / "away")
    assert loaded.trained(space, "runs/r/gguf") == {"model_name_or_path": "runs/r/merged"}
    (space.root / "runs" / "r" / "merged").rename(space.root / "gone")
    with pytest.raises(EdgeError, match="the training of runs/r has not ended"):
        loaded.trained(space, "runs/r/checkpoint-5")


def test_servers_are_known_by_their_jobs(space: Workspace) -> None:
    def record(number: int, argv: list[str], line: dict[str, Any], **state: Any) -> None:
        job = space.jobs_folder / f"{number:04}"
        job.mkdir(parents=True)
        about = {"argv": ["edge", *argv], "cwd": ".", "device": "", "created": 0}
        for name, value in (("job", about), ("state", state)):
            json_file.write(job / f"{name}.json", value)
        (job / "progress.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")

    me = jobs.process(os.getpid())
    ready = {"stage": "ready", "url": "http://127.0.0.1:1"}
    record(1, ["serve", "b.gguf", "--lora", "runs/r/adapter=a.gguf", *SERVED], ready, verb=me)
    record(2, ["serve", "b.gguf", "--name", "models/base", *SERVED], {"stage": "loading"}, verb=me)
    record(3, ["serve", "runs/r", "--port", "8000"], ready, verb=me)  # the Export tab's
    record(4, ["serve", "x", "--name", "models/x", *SERVED], ready, verb=me, exit_code=0)
    found = loaded.servers(space)
    assert {name: server.url for name, server in found.items()} == {
        "runs/r/adapter": "http://127.0.0.1:1",
        "models/base": "",
    }
    assert found["models/base"].memory > 2**20
    found["models/base"].job.folder.joinpath("stop").touch()
    assert list(loaded.servers(space)) == ["runs/r/adapter"]
