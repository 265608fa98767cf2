"""What was measured, where it is kept, and where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge.backends.llamacpp import Settings
from edge.errors import UnavailableError
from edge.loading import tune, tune_results
from edge.machine import hardware
from tests.support import tiny_llama

ASKED = Settings(threads=1)
RESULT: dict[str, Any] = {"chosen": {"threads": 3}, "date": "today", "seconds": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama.write(tmp_path / "m.gguf")


def no_home() -> Path:
    raise UnavailableError("this user has no home folder", "set HOME")


def under_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "edge"


@pytest.mark.parametrize("home", [True, False])
def test_u12_without_a_cache_it_is_served_untuned_and_said_once(
    home: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = under_a_file(tmp_path)
    monkeypatch.setattr(hardware, "cache_dir", (lambda: cache) if home else no_home)
    settings = tune_results.tuned(model, ASKED, lambda: pytest.fail("measured for nothing"))
    assert settings.threads == 1 and settings.tuned.startswith("skipped: ")
    reason = "cannot be written" if home else "no home folder"
    assert reason in settings.tuned
    [record] = caplog.records
    assert "m.gguf is served untuned" in record.getMessage() and reason in record.getMessage()


def test_a_result_in_a_cache_that_can_only_be_read_is_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwritable(name: str) -> Path:
        raise UnavailableError(f"{name} cannot be written")

    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path / "cache")
    assert tune_results.tuned(model, ASKED, lambda: RESULT).threads == 3
    monkeypatch.setattr(hardware, "writable_cache", unwritable)
    assert tune_results.tuned(model, ASKED, lambda: pytest.fail("measured again")).threads == 3


def test_a_disk_that_fills_up_while_it_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = tune_results._write

    def full(path: Path, result: dict[str, Any]) -> None:
        if result["state"] == "measured":
            raise OSError(28, "No space left on device")
        write(path, result)

    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(tune_results, "_write", full)
    assert tune_results.tuned(model, ASKED, lambda: RESULT).threads == 3
    assert "is not kept" in caplog.text and list((tmp_path / "cache" / "tune").iterdir()) == []


def test_u12_edge_tune_says_that_it_cannot_keep_the_result(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = under_a_file(tmp_path)
    monkeypatch.setattr(hardware, "cache_dir", lambda: cache)
    monkeypatch.setattr(tune, "_measure", lambda *_: pytest.fail("measured for nothing"))
    with pytest.raises(UnavailableError, match="tune cannot be written"):
        tune.main([str(model)])


def test_a_broken_result_is_measured_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cache_dir", lambda: tmp_path / "cache")
    path = tune_results.kept_path(model, ASKED)
    path.parent.mkdir(parents=True)
    for text in ("", "[]", "[" * 100_000, '{"state": "measured"}'):
        path.write_text(text, encoding="utf-8")
        assert tune_results.speed(model, ASKED) is None
        assert tune_results.tuned(model, ASKED, lambda: RESULT).threads == 3
    assert json.loads(path.read_text(encoding="utf-8"))["chosen"] == RESULT["chosen"]
