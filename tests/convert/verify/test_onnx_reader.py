"""The reader of ONNX files for `edge verify`: words and logits as the server has them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("tokenizers")

from convert.verify.compare import BOUNDS, compare, open_reader
from convert.verify.onnx_reader import OnnxReader
from edge.artefact import manifest
from edge.backends.base import Row
from edge.backends.onnx import Model, Onnx, Settings
from edge.errors import InputError
from tests.support import tiny_onnx


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("模型 run") / "onnx"
    tiny_onnx.write(made, name=tiny_onnx.FILE)
    manifest.write(made, manifest.Manifest("onnx", "微小", stop_ids=[tiny_onnx.END, 258], thinking="off"))
    return made


@pytest.fixture
def reader(folder: Path) -> Iterator[OnnxReader]:
    found = open_reader(folder)
    assert isinstance(found, OnnxReader)
    yield found
    found.close()


def test_words_are_those_of_the_folder(reader: OnnxReader) -> None:
    assert (reader.stage, reader.kind, reader.vocab) == ("onnx", "fp32", tiny_onnx.VOCAB)
    assert reader.kind in BOUNDS
    assert (reader.stop_ids, reader.thinking) == ({tiny_onnx.END, 258}, "off")
    messages = [{"role": "user", "content": "你好"}]
    text = reader.prompt(messages).text
    assert text == "<|begin|>你好<|end|>>"
    [ids] = reader.encode([text])
    assert reader.prompt_ids([messages]) == [ids]
    assert ids == [tiny_onnx.BOS, *"你好".encode(), tiny_onnx.END, ord(">")]
    assert reader.decode([ids, [0xE4]]) == ["你好>", "\ufffd"]


def test_logits_and_greedy_texts_are_the_backends(reader: OnnxReader) -> None:
    backend = Onnx(Model(reader.path), Settings(slots=1, context=256, batch=256, device="cpu"))
    ids = list(b"a prompt of some length " * 6)
    want = np.concatenate(
        [backend.step([Row(0, at, ids[at : at + 48], 48)]).copy() for at in range(0, len(ids), 48)]
    )
    [got] = reader.all_logits([ids], [len(ids)])
    assert got.shape == (len(ids), tiny_onnx.VOCAB)
    np.testing.assert_allclose(got, want, atol=1e-4)
    made = reader.greedy(ids, 12)
    assert made is not None
    assert made[0] == int(want[-1].argmax())
    backend.truncate(0, len(ids))
    for at, token in enumerate(made[:-1]):
        assert int(backend.step([Row(0, len(ids) + at, [token], 1)])[0].argmax()) == made[at + 1]
    assert len(made) == 12 or made[-1] in reader.stop_ids
    # It ends where the model ends.
    reader.stop_ids = frozenset({made[3]})
    assert reader.greedy(ids, 12) == made[: made.index(made[3]) + 1]
    backend.close()


def test_what_cannot_be_compared_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no GGUF"):
        open_reader(folder, lora=tmp_path / "adapter.gguf")


def test_a_lost_chat_template_is_a_difference(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "chat_template.jinja").unlink()
    (other / manifest.FILE).unlink()
    for a, b in ((folder, other), (other, folder)):
        with contextlib.closing(open_reader(a)) as first, contextlib.closing(open_reader(b)) as second:
            report = compare(first, second)
        assert report.facts["chat_template"] == "unequal" and report.logits == {}
        assert report.unequal[0].startswith("chat template: from character 0 on")


def test_a_special_token_that_differs_is_found_with_onnx_first(folder: Path, tmp_path: Path) -> None:
    """Planted: a token that no template or prompt holds is special in one of the two alone."""
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    [token] = [token for token in data["added_tokens"] if token["content"] == "<think>"]
    data["added_tokens"].remove(token)
    path.write_text(json.dumps(data), encoding="utf-8")
    (other / manifest.FILE).unlink()
    first = open_reader(folder)
    assert first.special_tokens() == ["<|begin|>", "<|end|>", "<think>"]
    for a, b in ((folder, other), (other, folder)):
        with contextlib.closing(open_reader(a)) as first, contextlib.closing(open_reader(b)) as second:
            first.stop_ids = second.stop_ids
            report = compare(first, second)
        assert report.facts["token_ids"] == "unequal" and len(report.unequal) == 1
        assert "'a <think>b" in report.unequal[0] and report.logits == {}


def test_logits_are_those_of_the_last_tokens_however_long(reader: OnnxReader) -> None:
    ids = list(b"abc" * 60)
    [whole] = reader.all_logits([ids], [len(ids)])
    for last in (1, 64, 65, 130, 180):
        [part] = reader.all_logits([ids], [last])
        np.testing.assert_allclose(part, whole[-last:], atol=1e-4)
