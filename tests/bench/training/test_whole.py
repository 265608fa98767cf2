"""`edge train` beside another program by the clock of the whole process; both are imitated here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.training import whole
from edge.errors import EdgeError, UsageError

TRAINER = """
import json, pathlib, sys, time, yaml
wait, steps, adapter = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "adapter"
keys = yaml.safe_load(pathlib.Path(sys.argv[4]).read_text("utf-8"))
time.sleep(wait)
out = pathlib.Path(keys["output_dir"], "adapter")
out.mkdir(parents=True)
state = {"global_step": steps, "log_history": [{"loss": keys["learning_rate"]}, {"train_loss": 9}]}
(out / "trainer_state.json").write_text(json.dumps(state))
if adapter:
    (out / "adapter_model.safetensors").write_bytes(b"")
else:
    sys.exit("the model was not found")
"""
KEYS = {"learning_rate": 0.5, "dataset": "数据"}


def trainer(folder: Path, wait: float, steps: int = 3, leaves: str = "adapter") -> list[str]:
    script = folder / "trainer.py"
    script.write_text(TRAINER, encoding="utf-8")
    return [sys.executable, str(script), str(wait), str(steps), leaves]


def test_both_sides_are_timed_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(whole, "EDGE", trainer(tmp_path, 0.0))
    found = whole.compare(KEYS, trainer(tmp_path, 0.5), rounds=2)
    said = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["edge", "peer", "peer", "edge"]
    assert found["seconds"]["peer"] > 0.5 and found["better_by"]["pairs"] == 2
    assert found["better_by"]["value"] > 1 and found["rounds"]["peer"][0]["last_loss"] == 0.5


def test_a_program_that_trains_nothing_or_something_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "EDGE", trainer(tmp_path, 0.0, steps=4))
    with pytest.raises(EdgeError, match="another number of steps"):
        whole.compare(KEYS, trainer(tmp_path, 0.0), rounds=1)
    with pytest.raises(EdgeError, match="trained no adapter") as error:
        whole.compare(KEYS, trainer(tmp_path, 0.0, leaves="nothing"), rounds=1)
    assert "the model was not found" in error.value.hint


def test_the_keys_are_those_that_were_given(tmp_path: Path) -> None:
    given = {
        "model_name_or_path": "m", "dataset": "d", "dataset_dir": str(tmp_path), "output_dir": "out",
        "learning_rate": "1e-4", "plot_loss": True,
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    keys = whole.keys_of(path, ["learning_rate=0.5", "quantization_bit=null"])
    assert keys["learning_rate"] == 0.5 and "quantization_bit" not in keys
    assert set(keys) == set(given) and keys["dataset"] == ["d"]
    assert Path(keys["dataset_dir"]).is_absolute()
    with pytest.raises(UsageError, match="learning_rat"):
        whole.keys_of(path, ["learning_rat=1"])
