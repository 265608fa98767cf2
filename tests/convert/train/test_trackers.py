"""Trackers of report_to: what each package is asked for, by packages that write it down."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.config import parse
from convert.train import trackers
from edge.errors import UnavailableError
from tests.convert.test_config import NEEDED

CALLS = {
    "wandb": ["init", "log", "finish"],
    "trackio": ["init", "log", "finish"],
    "swanlab": ["init", "log", "finish"],
    "mlflow": ["start_run", "log_params", "log_metrics", "end_run"],
}
LINES = [
    {"current_steps": 1, "loss": 2.0, "lr": 1e-4, "percentage": 50.0},
    {"current_steps": 2, "eval_loss": 1.5},
]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Packages of these names, each function of which notes its name and arguments."""
    noted: list[Any] = []
    monkeypatch.setattr(sys, "noted_calls", noted, raising=False)
    for name in CALLS:
        text = "import sys\ndef __getattr__(what):\n"
        text += f"    return lambda *a, **k: sys.noted_calls.append(('{name}', what, a, k))\n"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield noted
    for name in CALLS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", CALLS)
def test_each_is_opened_told_and_closed(name: str, calls: list[Any], tmp_path: Path) -> None:
    given = {"report_to": name, "run_name": "mine", "project": "p", "swanlab_project": "p"}
    open_trackers = trackers.Trackers(parse({**NEEDED, **given}), tmp_path)
    for line in LINES:
        open_trackers.log(line)
    open_trackers.close()
    assert {one[0] for one in calls} == {name}
    asked = [what for _, what, _, _ in calls]
    assert list(dict.fromkeys(asked)) == CALLS[name]
    assert "mine" in json.dumps(calls[0][3]) and "learning_rate" in repr(calls[:2])
    logged = [
        (arguments[0], more["step"]) for _, what, arguments, more in calls if what in ("log", "log_metrics")
    ]
    assert logged == [({"train/loss": 2.0, "train/lr": 1e-4}, 1), ({"train/eval_loss": 1.5}, 2)]


def test_all_are_those_that_are_installed(calls: list[Any]) -> None:
    named = trackers.named(parse({**NEEDED, "report_to": "all"}))
    assert set(CALLS) <= set(named) <= set(CALLS) | {"tensorboard"}
    assert trackers.named(parse({**NEEDED, "use_swanlab": True})) == ["swanlab"]
    assert trackers.named(parse(NEEDED)) == []


def test_one_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert trackers.named(parse({**NEEDED, "report_to": "all"})) == []
    with pytest.raises(UnavailableError, match=r"(?s)report_to: wandb needs .*pip install wandb"):
        trackers.named(parse({**NEEDED, "report_to": "wandb"}))
