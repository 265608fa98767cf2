"""The bare llama.cpp loop: its tokens, its rates, and the share of the memory of one stream."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from bench.engines.bare_llamacpp import BareLoop, Model
from bench.measure import roofline
from edge.artefact import find
from edge.artefact.gguf_header import read_header
from edge.errors import InputError, UsageError
from tests.support import tiny_llama


@pytest.mark.timing
@pytest.mark.parametrize("part", [0, 8])
def test_one_stream_has_its_share_of_the_memory(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """part: tensors of each of several files, all of which are read for a token."""
    pytest.importorskip("llama_cpp")
    tiny_llama.write(tmp_path / "m.gguf", part=part)
    path = find.resolve(tmp_path).path
    footprint = roofline.of_gguf(read_header(tiny_llama.write(tmp_path / "one.gguf")))
    readings = iter([2e9, 4e9])  # before and after: the better one counts
    monkeypatch.setattr(
        roofline, "bandwidth", lambda size, threads, seconds: roofline.Bandwidth(next(readings), 1e9, size, 2)
    )
    with contextlib.closing(Model(path)) as model:
        loop = BareLoop(model, 2, True, False, memory=True)
        prompt = [100 + n for n in range(10)]
        one, two = loop.run([prompt], (21,)), loop.run([prompt, prompt], (21, 21))
        assert one.decode and two.decode and one.prefill and two.memory_share is None
        most = 4e9 / footprint.per_token(10 + 20 / 2)
        assert one.memory_share == pytest.approx(one.decode / most)
        with pytest.raises(UsageError, match="64 KV cells do not hold 1 x 100 tokens"):
            BareLoop(model, 2, False, True, cells=64).run([prompt], (91,))


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    with pytest.raises(InputError, match=r"x\.gguf"):
        Model(tmp_path / "x.gguf")
