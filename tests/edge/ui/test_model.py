"""Whether a model fits this machine, by its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("nicegui")

from edge.ui.model import SERVING, TRAINING, TRAINING_IN_32, fitting, licence_of

GIB = 2**30


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def test_the_best_way_that_fits_is_named(tmp_path: Path) -> None:
    for number in (1, 2):  # 7 GiB in two files
        sparse(tmp_path / f"model-{number}.safetensors", 7 * GIB // 2)
    told = {free: fitting(tmp_path, free * GIB, SERVING) for free in (8, 7, 4, 3)}
    assert [text[-7:] for text in told.values()] == ["16 bits", " 8 bits", " 4 bits", ""]
    assert fitting(tmp_path, 8 * GIB, TRAINING) == "LoRA fits for training"
    assert fitting(tmp_path, 4 * GIB, TRAINING) == "QLoRA fits for training"
    assert fitting(tmp_path, 8 * GIB, TRAINING_IN_32) == "QLoRA fits for training"
    assert fitting(tmp_path, 3 * GIB, TRAINING) == ""


def test_a_gguf_is_served_as_it_is(tmp_path: Path) -> None:
    sparse(tmp_path / "a.gguf", 3 * GIB)
    assert fitting(tmp_path, 4 * GIB, SERVING) == "fits for serving"
    assert fitting(tmp_path, 3 * GIB, SERVING) == ""


def test_the_licence_is_named_by_its_first_line(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == ""
    (tmp_path / "LICENSE.txt").write_text("\n   Apache License\n  Version 2.0\n", encoding="utf-8")
    assert licence_of(tmp_path) == "Apache License"
