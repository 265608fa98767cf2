"""What is measured of onnxruntime at the first start, kept, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("tokenizers")

from edge.backends.onnx import Model, Settings
from edge.loading import tune_onnx, tune_results, tune_trials
from edge.machine import hardware
from tests.support import tiny_onnx


def test_tuning_measures_threads_and_spinning_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(tune_trials, "BUDGET_S", 60.0)
    model = Model(tiny_onnx.write(tmp_path / "模型 目录", name=tiny_onnx.FILE))
    asked = Settings(slots=4, context=512, threads=1, device="cpu")
    first = tune_onnx.settings(model, asked)
    assert first.tuned.startswith("measured")
    found = json.loads(tune_results.kept_path(model.path, asked).read_text(encoding="utf-8"))
    assert [(row["threads"], row["spin"]) for row in found["trials"]] == [(1, True), (1, False)]
    monkeypatch.setattr(tune_onnx, "measure", lambda *_: pytest.fail("measured twice"))
    assert tune_onnx.settings(model, asked) == first
    told = tune_results.speed(model.path, asked)
    assert told == (found["chosen"]["one"], found["chosen"]["eight"], found["chosen"]["prompt"])
