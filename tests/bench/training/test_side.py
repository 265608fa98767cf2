"""One side of a comparison of training: what is noted of a run, and processes that take turns."""

from __future__ import annotations

import pytest

from bench.training import side
from convert.config import TrainConfig
from edge.errors import EdgeError
from tests.support import toy


def test_a_course_notes_when_the_loss_has_arrived() -> None:
    course = side.Course(1.0)
    course.begin()
    course.step(4.0, 10)
    assert course.arrived is None and course.smooth == 4.0
    course.step(0.5, 10)
    assert course.smooth == pytest.approx(3.65)
    for _ in range(39):
        course.step(0.5, 10)
    numbers = course.numbers()
    assert 0 <= numbers["seconds_to_loss"] <= numbers["seconds"]
    assert (numbers["steps"], course.tokens) == (41, 410)
    assert sum(course.step_seconds()) == pytest.approx(numbers["seconds"])
    assert numbers["memory_peak"] >= numbers["training_peak"] > 2**20


@pytest.mark.slow
def test_sides_take_turns_and_a_failure_has_its_last_words(tmp_path, monkeypatch) -> None:
    (tmp_path / "told.py").write_text("import sys; print('log'); print('[1, \"' + sys.argv[1] + '\"]')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = list(side.in_turn(("a", "b"), 2, lambda name: ["told", name]))
    assert found == [(0, "a", [1, "a"]), (0, "b", [1, "b"]), (1, "b", [1, "b"]), (1, "a", [1, "a"])]
    with pytest.raises(EdgeError, match="plain loop failed") as caught:
        next(
            side.in_turn(("plain",), 1, lambda name: ["bench.training.side", name, str(tmp_path / "no.yaml")])
        )
    assert "no.yaml" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("name", side.SIDES)
def test_a_side_trains_on_random_rows(tmp_path, name) -> None:
    base = toy.make_model(tmp_path / "base")
    config = TrainConfig(
        model_name_or_path=str(base),
        dataset=("none",),
        output_dir=str(tmp_path / "out"),
        cutoff_len=8,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        use_cpu=True,
    )
    run, course = side.begin(config, 32), side.Course(0.0)
    side.train(name, run, course)
    assert (course.numbers()["steps"], course.tokens) == (2, 2 * 2 * 32)
    assert run.need.total > base.joinpath("model.safetensors").stat().st_size
    assert side.begin(config, 64).need.passes > run.need.passes
