"""Which models a command line of `edge serve` names."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pytest

from edge.artefact import find, manifest
from edge.engine.worker import Load
from edge.errors import InputError
from edge.server import model_plans
from edge.server.model_registry import Planned
from tests.support import tiny_llama


@pytest.mark.parametrize(("default", "once"), [(None, "a"), ("b", "b")])
def test_only_what_is_loaded_at_the_start_is_loaded_as_it_was_seen(
    monkeypatch: pytest.MonkeyPatch, default: str | None, once: str
) -> None:
    looks: list[str] = []

    def planned(path: Path, args: argparse.Namespace, lora: Path | None) -> Planned:
        looks.append(path.name)
        return Planned(Load(kind="fake", path=str(path)), bytes=len(looks))

    monkeypatch.setattr(model_plans, "plan_model", planned)
    args = argparse.Namespace(paths=[Path("a"), Path("b")], name=None, lora=[], default=default, wait=False)
    models = model_plans.plan_all(args)
    assert looks == ["a", "b"]
    first = {name: models[name]().bytes for name in ("a", "b")}
    other = "b" if once == "a" else "a"
    assert first[once] == looks.index(once) + 1
    assert looks == ["a", "b", other]
    # A reload looks afresh.
    assert models[once]().bytes == 4


def test_what_is_awaited_counts_once_its_manifest_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    args = argparse.Namespace(name=None)

    def planned(path: Path, args: argparse.Namespace) -> Planned:
        return Planned(Load(kind="fake"), find.resolve(path))

    monkeypatch.setattr(model_plans, "plan_model", planned)
    states = [find.models_state(run)]
    with pytest.raises(InputError, match="run is not there yet"):
        model_plans.plan_awaited(run, args)
    (run / "gguf").mkdir(parents=True)
    states.append(find.models_state(run))
    with pytest.raises(InputError, match="holds no GGUF"):
        model_plans.plan_awaited(run, args)
    model = tiny_llama.write(run / "gguf" / "x.gguf", template=None)
    states.append(find.models_state(run))
    with pytest.raises(InputError, match=r"gguf has no edge\.json yet"):
        model_plans.plan_awaited(run, args)
    # A file of its own, or a folder that is no run, has none.
    for path in (model, model.parent):
        found = model_plans.plan_awaited(path, args).artefact
        assert found is not None and found.name == "x"
    assert find.models_state(model) == find.models_state(model)
    manifest.write(run / "gguf", manifest.Manifest(stage="gguf", name="conch"))
    states += [find.models_state(run), find.models_state(run)]
    for args.name, name in ((None, "conch"), ("mine", "mine")):
        found = model_plans.plan_awaited(run, args).artefact
        assert found is not None and (found.name, found.path) == (name, model)
    # A look that finds something new to read differs from the one before.
    assert [a == b for a, b in itertools.pairwise(states)] == [False, False, False, True]
