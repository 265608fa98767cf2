"""The command that measures training, on a toy: every part runs and has its figures."""

import json

import pytest
from rich.console import Console

from bench import cli
from bench.training import run as train
from convert.config import as_yaml, parse
from convert.train import finetune
from edge.errors import UsageError
from tests.support.toy import make_model

ROWS = [{"instruction": f"question {n} " * (1 + n % 3), "output": f"answer {n}."} for n in range(12)]


@pytest.mark.matrix
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
    finetune.run(config, console=Console(quiet=True))
    path = tmp_path / "c.yaml"
    path.write_text(as_yaml(config), encoding="utf-8")
    monkeypatch.setattr(train, "SETTINGS", (("per_device_train_batch_size=1",),))
    words = ["--rounds", "1", "--steps", "2", "--parts", "speed,batches,memory,heldout", "--loss", "4"]
    words += ["--batches", "2x16"]
    assert cli.main(["train", str(path), *words]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown.splitlines()[-1])
    plain, edge = (found["speed"]["sides"][side] for side in ("plain", "edge"))
    assert edge["tokens_per_s"] > 0 and edge["memory_peak"] > 100 * 2**20
    ratio = found["speed"]["better_by"]["tokens_per_s"]
    assert ratio["value"] == pytest.approx(edge["tokens_per_s"] / plain["tokens_per_s"])
    # The toy begins at about log(vocabulary) and learns: both arrive.
    assert edge["seconds_to_loss"] > 0 and plain["seconds_to_loss"] > 0
    assert "seconds to loss 4" in shown and "peak memory" in shown
    kept = json.loads((tmp_path / "run" / "training.json").read_text(encoding="utf-8"))
    assert kept["kind"] == "bench-train" and kept["speed"]["rounds"]["plain"][0]["steps"] == 36
    assert kept["speed"]["rounds"]["edge"][0]["steps"] == 36
    text = (tmp_path / "run" / "training.md").read_text(encoding="utf-8")
    assert "| tokens/s |" in text and f"edge bench train {path}" in text
    for (numbers,) in kept["batches"]["2x16"]["rounds"].values():
        # Twelve of the sixteen steps count, of two rows of 16 tokens each.
        seconds = numbers["seconds"] - numbers["setting_up_s"]
        assert numbers["steps"] == 16 and numbers["tokens_per_s"] == pytest.approx(12 * 32 / seconds)
    assert "## random rows, 2x16" in text
    (line,) = found["memory"]
    assert line["setting"] == "per_device_train_batch_size=1" and line["measured"] > 0.2
    # What the run folder held before is still there.
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert found["heldout"]["asked"] == 2 and found["heldout"]["in_persona"] == 1


def side(rate, arrived, memory):
    return {
        "tokens_per_s": rate,
        "seconds_to_loss": arrived,
        "loss": 1.0,
        "memory_peak": memory,
        "gpu_peak": None,
    }


def test_a_loss_that_was_not_reached_in_every_round_has_no_median():
    found = train.compared(
        {"plain": [side(100, 20.0, 4000), side(110, None, 4100)], "edge": [side(200, 10.0, 2000)] * 2}
    )
    assert found["sides"]["plain"]["seconds_to_loss"] is None
    assert found["sides"]["edge"]["seconds_to_loss"] == 10.0
    assert found["sides"]["plain"]["memory_peak"] == 4100
    assert found["better_by"]["seconds_to_loss"]["pairs"] == 1
    assert found["better_by"]["memory_peak"]["value"] == pytest.approx((2.0 * 2.05) ** 0.5)
    assert found["better_by"]["gpu_peak"] is None
    rows = train.rows_of({"goal": 1.0, **found})
    assert rows[1][1:3] == ("not reached", "10.0") and len(rows) == 4


def test_what_cannot_be_measured_is_refused(tmp_path):
    for words in (["--parts", "x"], ["--rounds", "0"], ["--batches", "4"]):
        with pytest.raises(UsageError, match=words[0]):
            train.main([str(tmp_path / "c.yaml"), *words])
