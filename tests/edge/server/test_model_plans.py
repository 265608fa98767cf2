"""Which models a command line of `edge serve` names."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from edge.engine.worker import Load
from edge.server import model_plans
from edge.server.model_registry import Planned


@pytest.mark.parametrize(("default", "once"), [(None, "a"), ("b", "b")])
def test_only_what_is_loaded_at_the_start_is_loaded_as_it_was_seen(
    monkeypatch: pytest.MonkeyPatch, default: str | None, once: str
) -> None:
    looks: list[str] = []

    def planned(path: Path, args: argparse.Namespace, lora: Path | None) -> Planned:
        looks.append(path.name)
        return Planned(Load(kind="fake", path=str(path)), bytes=len(looks))

    monkeypatch.setattr(model_plans, "plan_model", planned)
    args = argparse.Namespace(paths=[Path("a"), Path("b")], name=None, lora=[], default=default)
    models = model_plans.plan_all(args)
    assert looks == ["a", "b"]
    first = {name: models[name]().bytes for name in ("a", "b")}
    other = "b" if once == "a" else "a"
    assert first[once] == looks.index(once) + 1
    assert looks == ["a", "b", other]
    # A reload looks afresh.
    assert models[once]().bytes == 4
