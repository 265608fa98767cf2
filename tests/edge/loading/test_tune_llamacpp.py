"""What is measured of llama.cpp at the first start, kept, and read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edge.backends.llamacpp import LlamaCpp, MemoryFullError, Model, Settings
from edge.loading import tune_llamacpp, tune_results, tune_trials
from edge.loading.tune_trials import Trial
from edge.machine import hardware
from tests.support import tiny_llama


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.publish(tmp_path_factory.mktemp("运行 run"))


def test_tuning_measures_once_and_keeps_the_result(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(tune_trials, "BUDGET_S", 60.0)
    model = Model(run / "gguf" / "微小.gguf")
    asked = Settings(threads=1, slots=8)
    first = tune_llamacpp.settings(model, asked)
    again = tune_llamacpp.settings(model, asked)
    assert first == again
    assert first.tuned.startswith("measured")
    assert len(list((tmp_path / "tune").iterdir())) == 1
    monkeypatch.setattr(tune_llamacpp, "measure", lambda *_: pytest.fail("measured twice"))
    assert tune_llamacpp.settings(model, asked) == first
    model.close()


def test_a_layout_that_the_plan_has_no_room_for_is_never_tried() -> None:
    asked = Settings(slots=4, context=512, capacity=1024)
    assert asked.layouts == [True]
    assert dataclasses.replace(asked, per_slot_fits=True).layouts == [True, False]


def test_tuning_that_killed_the_process_is_not_tried_again(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path)
    model = Model(run / "gguf" / "微小.gguf")
    asked = Settings(threads=1)
    path = tune_results.kept_path(model.path, asked)
    path.parent.mkdir()
    path.write_text('{"state": "measuring"}', encoding="utf-8")
    assert tune_llamacpp.settings(model, asked).tuned.startswith("skipped")
    model.close()


def test_a_machine_too_busy_to_measure_is_served_as_asked(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(tune_trials, "BUDGET_S", -1.0)
    model = Model(run / "gguf" / "微小.gguf")
    settings = tune_llamacpp.settings(model, Settings(threads=1))
    assert "too busy" in settings.tuned
    assert list((tmp_path / "tune").iterdir()) == []
    model.close()


def test_of_two_layouts_that_are_near_the_per_slot_buffers_are_taken() -> None:
    def trial(unified: bool, one: float) -> Trial:
        return Trial({"threads": 2, "flash_attention": False, "unified": unified}, (one, 1.0, 1.0))

    def taken(*trials: Trial) -> bool:
        return bool(tune_llamacpp.best(trials).choice["unified"])

    assert not taken(trial(True, 1.0), trial(False, 1.02))
    assert taken(trial(True, 1.0), trial(False, 1.3))


def test_where_a_gpu_has_no_room_for_all_choices_each_is_measured_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One context at a time fits, and none without flash attention."""
    model = Model(run / "gguf" / "微小.gguf")
    open_now: list[LlamaCpp] = []

    class Narrow(LlamaCpp):
        def __init__(self, model: Model, settings: Settings) -> None:
            if open_now or not settings.flash_attention:
                raise MemoryFullError("the memory is full")
            super().__init__(model, settings)
            open_now.append(self)

        def close(self) -> None:
            super().close()
            open_now.remove(self)

    monkeypatch.setattr(tune_llamacpp, "LlamaCpp", Narrow)
    asked = Settings(threads=1, slots=2, context=256, per_slot_fits=True, flash_attention=True)
    result = tune_llamacpp.measure(model, asked)
    assert [(row["flash_attention"], row["unified"]) for row in result["trials"]] == [
        (True, True),
        (True, False),
    ]
    assert not open_now
    with pytest.raises(MemoryFullError):
        tune_llamacpp.measure(model, dataclasses.replace(asked, flash_attention=False))
    model.close()
