"""What the page reads of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge.errors import EdgeError, InputError
from edge.ui.form import Form, number
from edge.ui.workspace import Workspace, read_yaml


def test_models_and_runs(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    assert space.models() == [] and space.runs() == [] and space.jobs() == []
    for name in ("models/b/config.json", "models/a/edge.json", "runs/r/adapter/edge.json", "runs/empty/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text('{"settings": {"lora_rank": 4}}', encoding="utf-8")
    (tmp_path / "models" / "note.txt").touch()
    for step in (5, 10):
        (tmp_path / "runs" / "r" / f"checkpoint-{step}").mkdir()
    (tmp_path / "runs" / "r" / "trainer_log.jsonl").write_text('{"loss": 1}\n{"lo', encoding="utf-8")
    (tmp_path / "runs" / "r" / "all_results.json").write_text('{"eval_loss": 2}', encoding="utf-8")
    assert [space.short(path) for path in space.models()] == ["models/a", "models/b"]
    [run] = space.runs()
    assert (run.stages, run.checkpoints, run.log) == (
        ["adapter"],
        ["checkpoint-5", "checkpoint-10"],
        [{"loss": 1}],
    )
    assert run.settings == {"lora_rank": 4} and run.results == {"eval_loss": 2}
    space.delete(run)
    assert space.runs() == []


def test_a_configuration_is_read_and_a_text_that_is_none_is_refused() -> None:
    assert read_yaml("a: 1\nb: [x]") == {"a": 1, "b": ["x"]}
    for text in ("- 1", "a: [", ""):
        with pytest.raises(InputError):
            read_yaml(text)


def test_the_form_is_kept_on_disk(tmp_path: Path) -> None:
    form = Form(tmp_path / "jobs" / "form.json")
    form.set("learning_rate", "1e-4")
    form.set("lora_rank", "8")
    form.set("output_dir", "runs/名")
    form.set("lora_rank", "")
    again = Form(tmp_path / "jobs" / "form.json")
    assert again.values["learning_rate"] == 1e-4 and "lora_rank" not in again.values
    assert read_yaml(again.yaml()) == again.values
    with pytest.raises(InputError):
        Form(tmp_path / "none.json").name  # noqa: B018
    assert read_yaml(again.draft({"dataset": "x", "dataset_dir": None}).read_text("utf-8"))["dataset"] == "x"
    assert [number(text) for text in ("3", "1e-4", "none", "0.1,0.2")] == [3, 1e-4, "none", "0.1,0.2"]


@pytest.mark.slow
def test_a_verb_is_asked_and_its_message_comes_back(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    (tmp_path / "a.yaml").write_text(json.dumps({"learning_rate": 1}), encoding="utf-8")
    with pytest.raises(EdgeError) as raised:
        space.ask("train", "a.yaml", "--print-config")
    assert "model_name_or_path" in raised.value.message


@pytest.mark.slow
def test_a_configuration_without_end_is_refused() -> None:
    with pytest.raises(InputError, match="no YAML"):
        read_yaml("a: " + "[" * 5000)
