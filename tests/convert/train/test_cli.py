"""`edge train`: its arguments, and `--progress json` on a toy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from convert.config import as_yaml, parse
from convert.train import cli as train_cli
from edge import cli
from edge.console import guarded
from edge.errors import UsageError
from tests.convert.test_config import NEEDED
from tests.support.runs import configure

FLAGS = (
    "--model_name_or_path m --stage sft --do_train --dataset a,b --output_dir o --plot_loss --max_steps -1"
)


def test_what_began_from_another_runs_checkpoint_goes_on_from_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*FLAGS.replace(" o ", f" {tmp_path} ").split(), "resume_from_checkpoint=x/checkpoint-5"]

    def begins() -> Any:
        assert train_cli.main([*words, "--resume", "--print-config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)["resume_from_checkpoint"]

    assert begins() == "x/checkpoint-5"
    (tmp_path / "checkpoint-6").mkdir()
    assert begins() is True


def test_keys_as_options_as_in_llamafactorys_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*words: str) -> dict[str, Any]:
        assert train_cli.main([*words, "--print-config"]) == 0
        given: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        return given

    given = printed(*FLAGS.split(), "--learning_rate=1e-4", "--save_only_model", "false", "--bf16")
    assert (given["dataset"], given["do_train"], given["plot_loss"], given["bf16"]) == (
        "a,b",
        True,
        True,
        True,
    )
    assert (given["max_steps"], given["learning_rate"], given["save_only_model"]) == (-1, 1e-4, False)
    path = tmp_path / "x.yaml"
    path.write_text(as_yaml(parse({**NEEDED, "max_steps": 9})), encoding="utf-8")
    # The form of LlamaBoard's preview, before and after the file.
    assert printed("--max_steps", "3", str(path))["max_steps"] == 3
    assert printed(str(path), "--bf16", "max_steps=4", "--do_train")["max_steps"] == 4
    with pytest.raises(UsageError, match="use_galore: True is known"):
        train_cli.main([str(path), "--use_galore"])
    with pytest.raises(SystemExit):
        train_cli.main([str(path), "--no_such_key", "3"])


@pytest.mark.slow
def test_progress_as_json_lines(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = configure(tmp_path, base)(max_steps=3, val_size=2, eval_strategy="steps", eval_steps=2)
    path = tmp_path / "配置.yaml"
    path.write_text(as_yaml(config), encoding="utf-8")
    assert guarded(cli.main, ["train", str(path), "--progress", "json"]) == 0
    out, err = capfd.readouterr()
    *lines, last = [json.loads(line) for line in out.splitlines()]
    assert last["exit_code"] == 0 and Path(last["result"]["path"]) == tmp_path / "run" / "adapter"
    assert [line["stage"] for line in lines][:2] == ["reading the data", "loading the model"]
    steps = [line for line in lines if "loss" in line]
    assert [(line["step"], line["done"], line["total"], line["unit"]) for line in steps] == [
        (step, step, 3, "steps") for step in (1, 2, 3)
    ]
    log = [
        json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text("utf-8").splitlines()
    ]
    logged = [line for line in log if "loss" in line]
    for name, key in (("loss", "loss"), ("learning_rate", "lr"), ("grad_norm", "grad_norm")):
        assert [line[name] for line in steps] == pytest.approx([line[key] for line in logged], abs=1e-4)
    assert steps[-1]["seconds_left"] == 0 and steps[0]["memory"] > 2**20 and steps[0]["tokens_per_s"] > 0
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses == pytest.approx([line["eval_loss"] for line in log if "eval_loss" in line], abs=1e-5)
    assert "steps to train" not in out and "rows to train on" in err


@pytest.mark.slow
def test_the_plan_says_steps_and_memory_and_trains_nothing(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path, base)(num_train_epochs=2, val_size=2)
    rows = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    (tmp_path / "d.json").write_text(json.dumps([*rows, {"instruction": "q"}]), encoding="utf-8")
    path = tmp_path / "plan.yaml"
    path.write_text(as_yaml(config), encoding="utf-8")
    assert guarded(cli.main, ["train", str(path), "--plan", "--progress", "json"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])["result"]
    # 8 rows, 2 at a time, twice.
    assert (found["rows"], found["held_out"], found["steps"], found["device"]) == (8, 2, 8, "cpu")
    assert 2**20 < found["memory"] < found["free"]
    assert any(line.startswith("1 of 11 rows are left out") for line in found["notes"])
    assert not (tmp_path / "run").exists()
