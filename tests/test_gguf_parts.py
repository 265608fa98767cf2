"""GGUF models in several files: all parts are checked, and a missing one is said."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from edge import artefact
from edge.errors import InputError
from edge.gguf_header import read_header
from edge.gguf_parts import read_whole
from tests import tiny_llama


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    tiny_llama.write(tmp_path / "模型 m.gguf", part=8)
    return sorted(tmp_path.glob("*.gguf"))


def test_the_parts_are_one_model(parts: list[Path], tmp_path: Path) -> None:
    assert parts[0].name == f"模型 m-00001-of-{len(parts):05d}.gguf" and len(parts) > 2
    (tmp_path / "one").mkdir()
    one = read_header(tiny_llama.write(tmp_path / "one" / "m.gguf"))
    found = artefact.resolve(tmp_path)
    assert found.path == parts[0] and found.header.weights_bytes == one.weights_bytes
    whole = read_whole(parts[0])
    assert whole.tensors.keys() == one.tensors.keys() and whole.chat_template == one.chat_template
    assert whole.file_size == sum(path.stat().st_size for path in parts)
    assert read_whole(one.path) == one


def test_parts_that_do_not_fit_are_said(parts: list[Path]) -> None:
    def refused(message: str, path: Path = parts[0]) -> None:
        with pytest.raises(InputError, match=message):
            artefact.resolve(path)

    refused("is not the first of its parts", parts[1])
    kept = parts[1].read_bytes()
    shutil.copyfile(parts[2], parts[1])
    refused("is not part 2 of")
    parts[1].write_bytes(kept[:-4096])
    refused("it is truncated")
    parts[1].unlink()
    refused("lacks 1 of its .* parts: 模型 m-00002-of-")
    renamed = parts[0].rename(parts[0].with_name("m.gguf"))
    refused("which its name does not say", renamed)


@pytest.mark.slow
def test_parts_are_loaded_and_verified(parts: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from convert import verify

    (tmp_path / "one").mkdir()
    one = tiny_llama.write(tmp_path / "one" / "m.gguf")
    report = verify.run(one, parts[0], console=Console(file=io.StringIO()))
    assert report.unequal == [] and report.logits["kl_max"] == 0.0
    assert report.logits["greedy_equal"] == report.logits["greedy_tokens"]
