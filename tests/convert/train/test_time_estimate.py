"""How long a training will take: by the last one of its kind beside it, or by steps that are tried."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from convert.config import TrainConfig, parse
from convert.data.encode import Sample
from convert.train import finetune, time_estimate
from edge.artefact import manifest
from tests.support.runs import configure

QUIET = Console(quiet=True)


def config(**changes: Any) -> TrainConfig:
    given = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "per_device_train_batch_size": 2}
    return parse({**given, **changes})


def row(size: int) -> Sample:
    from array import array

    return Sample(f"r{size}", array("i", [5] * size), ((0, size),))


def test_the_last_training_of_the_kind_tells(tmp_path: Path) -> None:
    wanted = time_estimate.kind(config(), "cpu", "float32", 1)
    assert wanted["machine"] and wanted["model_name_or_path"] == "m"
    assert time_estimate.earlier(tmp_path / "new", wanted) is None

    def trained(name: str, created: str, speed: float, **other: Any) -> None:
        folder = tmp_path / name / "adapter"
        folder.mkdir(parents=True)
        settings = {**wanted, "tokens_per_second": speed, **other}
        manifest.write(folder, manifest.Manifest("adapter", name, settings=settings))
        about = manifest.read(folder)
        (folder / manifest.FILE).write_text(
            (folder / manifest.FILE).read_text("utf-8").replace(about.created, created), encoding="utf-8"
        )

    trained("a", "2026-01-01T00:00:00", 100.0)
    trained("b", "2026-01-02T00:00:00", 200.0)
    # Of another kind, or brought here from another machine.
    trained("c", "2026-01-03T00:00:00", 300.0, quantization_bit=4)
    trained("d", "2026-01-04T00:00:00", 400.0, machine="another")
    (tmp_path / "e" / "adapter").mkdir(parents=True)
    (tmp_path / "e" / "adapter" / "edge.json").write_text("{", encoding="utf-8")
    assert time_estimate.earlier(tmp_path / "new", wanted) == (200.0, tmp_path / "b")


def test_tokens_of_all_steps_and_rows_of_all_lengths() -> None:
    items = [row(size) for size in range(1, 101)]  # 5050 tokens, 50 batches
    assert time_estimate.tokens(config(), items, 100, 1) == 10100
    assert time_estimate.tokens(config(gradient_accumulation_steps=5), items, 10, 1) == 5050
    chosen = time_estimate.sample(config(), items)
    assert len(chosen) == 8 and chosen[0].size < 10 and chosen[-1].size > 80
    assert len(time_estimate.sample(config(), items[:3])) == 3


@pytest.mark.slow
def test_a_plan_tells_the_time_and_its_source(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = configure(tmp_path, base, max_steps=40, save_strategy="no")
    told = finetune.plan(made("first"))
    assert told["seconds"] is None and "--measure tries" in capsys.readouterr().out
    tried = finetune.plan(made("first"), measure=True)
    assert tried["seconds"] == pytest.approx(tried["tokens"] / tried["speed"]) and tried["speed"] > 0
    assert "steps that were tried" in capsys.readouterr().out
    assert not Path(made("first").output_dir).exists()

    finetune.run(dataclasses.replace(made("first"), max_steps=4), console=QUIET)
    told = finetune.plan(made("second"), measure=True)
    assert told["speed_of"] == os.path.abspath(made("first").output_dir)  # noqa: PTH100
    speed = manifest.read(Path(made("first").output_dir) / "adapter").settings["tokens_per_second"]
    assert (told["steps"], told["speed"]) == (40, speed)
