"""What answers a file of questions: a command for each model of the chat, behind what makes its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("nicegui")

from edge.ui.batch import predictions
from edge.ui.conversation import Conversation
from edge.ui.workspace import Workspace


def test_each_model_has_its_command_and_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    adapter = tmp_path / "runs" / "r" / "adapter"
    adapter.mkdir(parents=True)
    config = json.dumps({"base_model_name_or_path": "models/base"})
    (adapter / "adapter_config.json").write_text(config, encoding="utf-8")
    talk = Conversation(tmp_path / "chat.json")
    talk.models, talk.system = ["models/base", "runs/r/adapter"], "你是海螺。"
    file = tmp_path / "answers" / "q-1" / "q.txt"
    export, plain, lora, tuned = predictions(Workspace(tmp_path), talk, file)
    # What both need is made once.
    assert (export, lora) == (["export", "gguf", "models/base"], ["export", "lora", "runs/r"])
    settings = ["--system", "你是海螺。", "--temperature", "0.7", "--max-tokens", "512"]
    asked = ["predict", "models/base/gguf", "answers/q-1/q.txt", "--out"]
    assert plain == [*asked, "answers/q-1/models-base", *settings]
    assert tuned == [*asked, "answers/q-1/runs-r-adapter", "--lora", "runs/r/lora", *settings]
    # One model on both sides answers once; a file that is there is not made anew.
    (tmp_path / "models" / "base" / "b.gguf").touch()
    talk.models = ["models/base", "models/base"]
    assert [argv[1] for argv in predictions(Workspace(tmp_path), talk, file)] == ["models/base"]
