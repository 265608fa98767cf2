"""The command that measures training, on a toy: every part runs and has its figures."""

import json

import pytest
from rich.console import Console

from bench import train
from convert import qlora
from edge.config import as_yaml, parse
from tests.toy import make_model

ROWS = [{"instruction": f"question {n} " * (1 + n % 3), "output": f"answer {n}."} for n in range(12)]


@pytest.mark.slow
def test_every_part(tmp_path, capsys, monkeypatch):
    (tmp_path / "d.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")
    questions = [
        {"question": ROWS[0]["instruction"], "keywords": ["answer"]},
        {"question": "x", "keywords": ["zzz"]},
    ]
    (tmp_path / "d_heldout.json").write_text(json.dumps(questions), encoding="utf-8")
    config = parse(
        {
            "model_name_or_path": str(make_model(tmp_path / "m")),
            "dataset": "d",
            "dataset_dir": str(tmp_path),
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "quantization_bit": 4,
            "cutoff_len": 128,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "constant",
            "num_train_epochs": 12,
            "save_strategy": "no",
        }
    )
    qlora.run(config, console=Console(quiet=True))
    path = tmp_path / "c.yaml"
    path.write_text(as_yaml(config), encoding="utf-8")
    monkeypatch.setattr(train, "SETTINGS", (("per_device_train_batch_size=1",),))
    assert train.main([str(path), "--rounds", "1", "--steps", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for part in ("speed", "packing"):
        assert found[part]["edge"]["tokens_per_second"] > 0 and found[part]["better_by"] > 0
    (line,) = found["memory"]
    assert line["setting"] == "per_device_train_batch_size=1" and line["measured"] > 0.2
    assert found["heldout"]["asked"] == 2 and found["heldout"]["in_persona"] == 1


def test_a_course_notes_when_the_loss_has_arrived():
    course = train.Course()
    course.step(4.0, 10)
    assert course.arrived is None and course.smooth == 4.0
    for _ in range(40):
        course.step(0.5, 10)
    pace = train.Pace()
    course.into(pace)
    assert course.arrived is not None and course.tokens == 410
    assert pace.numbers()["seconds_to_loss_1"] == round(course.arrived, 1)
