"""GGUF models in several files: all parts are checked, and a missing one is said."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from convert.export import gguf_split
from edge.artefact import find
from edge.artefact.gguf_header import GGUFArray, read_header
from edge.artefact.gguf_shards import read_whole
from edge.backends.base import Row
from edge.backends.llamacpp import LlamaCpp, Model, Settings
from edge.errors import InputError, UsageError
from tests.support import tiny_llama


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    tiny_llama.write(tmp_path / "模型 m.gguf", part=8)
    return sorted(tmp_path.glob("*.gguf"))


def test_the_parts_are_one_model(parts: list[Path], tmp_path: Path) -> None:
    assert parts[0].name == f"模型 m-00001-of-{len(parts):05d}.gguf" and len(parts) > 2
    (tmp_path / "one").mkdir()
    one = read_header(tiny_llama.write(tmp_path / "one" / "m.gguf"))
    found = find.resolve(tmp_path)
    assert found.path == parts[0] and found.header.weights_bytes == one.weights_bytes
    whole = read_whole(parts[0])
    assert whole.tensors.keys() == one.tensors.keys() and whole.chat_template == one.chat_template
    assert whole.file_size == sum(path.stat().st_size for path in parts)
    assert read_whole(one.path) == one


def test_parts_that_do_not_fit_are_said(parts: list[Path]) -> None:
    def refused(message: str, path: Path = parts[0]) -> None:
        with pytest.raises(InputError, match=message):
            find.resolve(path)

    refused("is not the first of its shards", parts[1])
    kept = parts[1].read_bytes()
    shutil.copyfile(parts[2], parts[1])
    refused("is not shard 2 of")
    parts[1].write_bytes(kept[:-4096])
    refused("it is truncated")
    parts[1].unlink()
    refused("lacks 1 of its .* shards: 模型 m-00002-of-")
    renamed = parts[0].rename(parts[0].with_name("m.gguf"))
    refused("which its name does not say", renamed)


@pytest.mark.slow
def test_parts_are_loaded_and_verified(parts: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from convert.verify import compare

    (tmp_path / "one").mkdir()
    one = tiny_llama.write(tmp_path / "one" / "m.gguf")
    report = compare.run(one, parts[0], console=Console(file=io.StringIO()))
    assert report.unequal == [] and report.logits["kl_max"] == 0.0
    assert report.logits["greedy_equal"] == report.logits["greedy_tokens"]


# -- made here ----------------------------------------------------------------------------------------------


def _values(of: Any) -> Any:
    return of.values() if isinstance(of, GGUFArray) else of


def test_a_file_in_parts_is_the_same_model(tmp_path: Path) -> None:
    path = tiny_llama.write(tmp_path / "模型 m.gguf")
    whole = read_header(path)
    told = {name: _values(value) for name, value in whole.metadata.items()}
    first = gguf_split.split(path, 70_000)
    assert first.name.startswith("模型 m-00001-of-0") and not path.exists()
    parts = read_whole(first)
    same = {name: (one.shape, one.type, one.bytes) for name, one in whole.tensors.items()}
    assert {name: (one.shape, one.type, one.bytes) for name, one in parts.tensors.items()} == same
    for file in tmp_path.iterdir():
        assert sum(one.bytes for one in read_header(file).tensors.values()) <= 70_000
    assert parts.chat_template == whole.chat_template and parts.vocab_size == whole.vocab_size
    assert {name: _values(parts.metadata[name]) for name in told} == told

    def logits(of: Path) -> Any:
        backend = LlamaCpp(Model(of), Settings(slots=1, context=64, capacity=64, threads=1))
        return backend.step([Row(0, 0, tiny_llama.ids("hello"), 1)]).copy()

    again = tiny_llama.write(tmp_path / "again.gguf")
    np.testing.assert_array_equal(logits(first), logits(again))
    # Small enough as it is.
    assert gguf_split.split(again, 10**9) == again and again.is_file()
    with pytest.raises(InputError, match=r"again.gguf: \S+ alone has"):
        gguf_split.split(again, 1000)


@pytest.mark.parametrize(("given", "size"), [("2G", 2 * 10**9), ("500m", 5 * 10**8)])
def test_sizes_of_parts(given: str, size: int) -> None:
    assert gguf_split.parse_size(given) == size
    with pytest.raises(UsageError, match="--split-max-size"):
        gguf_split.parse_size(given + "iB")
