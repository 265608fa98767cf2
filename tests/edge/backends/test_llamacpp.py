"""The llama.cpp backend on a tiny real model: the Protocol's promises, and the engine over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from edge.artefact.gguf_shards import read_whole
from edge.backends import llamacpp_embedding
from edge.backends.base import Row, StepInterrupted
from edge.backends.llamacpp import LlamaCpp, Model, Settings
from edge.backends.onnx_tokenizer import byte_table
from edge.engine import protocol as msg
from edge.engine.core import Engine
from edge.engine.request import prompt_tokens
from edge.engine.sampling import Params
from edge.errors import EdgeError, InputError
from edge.machine import build_llamacpp, hardware
from tests.support import tiny_gguf, tiny_llama
from tests.support.tiny_llama import VOCAB, ids

SMALL = Settings(slots=4, context=128, capacity=256, batch=64)
LAYOUTS = [(unified, flash) for unified in (True, False) for flash in (True, False)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    # S16: native code must open a path that is not ASCII.
    folder = tmp_path_factory.mktemp("模型 目录")
    loaded = Model(tiny_llama.write(folder / "тест.gguf"))
    yield loaded
    loaded.close()


@pytest.fixture(params=LAYOUTS, ids=lambda p: f"unified={p[0]}-flash={p[1]}")
def backend(model: Model, request: pytest.FixtureRequest) -> Iterator[LlamaCpp]:
    unified, flash = request.param
    made = LlamaCpp(model, dataclasses.replace(SMALL, unified=unified, flash_attention=flash))
    yield made
    made.close()


def test_what_it_says_of_itself(backend: LlamaCpp) -> None:
    info = backend.info
    assert info.name == "тест.gguf"
    assert info.vocab == VOCAB
    assert info.stop_ids >= {2, tiny_llama.END}
    assert (info.bos_id, info.bos_text, info.eos_text, info.add_bos) == (1, "<s>", "</s>", True)
    assert info.chat_template == tiny_llama.TEMPLATE


def test_u31_a_build_from_elsewhere_is_named(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for info, stock in ({"version": "0.3.36"}, False), ({}, True):
        monkeypatch.setattr(build_llamacpp, "build_info", lambda info=info: info)
        backend = LlamaCpp(model, SMALL)
        assert backend.info.settings["build"].startswith("stock (") is stock
        backend.close()


def test_encode_and_decode(backend: LlamaCpp) -> None:
    text = "a  3\n你好👩‍🚀\0!"
    assert backend.encode(text, special=False) == ids(text)
    assert b"".join(backend.decode(i) for i in ids(text)) == text.encode()
    assert backend.encode("<|user|>x", special=True) == [tiny_llama.USER, *ids("x")]
    assert len(backend.encode("<|user|>x", special=False)) == 9
    assert backend.decode(tiny_llama.USER) == b""


def test_chunks_batches_and_outputs_give_the_same_logits(backend: LlamaCpp) -> None:
    prompt = ids("the quick brown fox")
    whole = backend.step([Row(0, 0, prompt, len(prompt))]).copy()
    assert whole.shape == (len(prompt), VOCAB)
    alone = backend.step([Row(3, 0, ids("otherx"), 1)]).copy()
    backend.truncate(3, 0)
    backend.step([Row(1, 0, prompt[:7], 0), Row(2, 0, ids("other"), 1)])
    mixed = backend.step([Row(2, 5, ids("x"), 1), Row(1, 7, prompt[7:], 2), Row(3, 0, ids("third"), 0)])
    assert mixed.shape == (3, VOCAB)
    np.testing.assert_allclose(mixed[:1], alone, atol=2e-3)
    np.testing.assert_allclose(mixed[1:], whole[-2:], atol=2e-3)


@pytest.mark.parametrize("text", ["abcdefgh", "abcdefgh" * 5], ids=["few cells", "most of a part"])
def test_copy_and_truncate(backend: LlamaCpp, text: str) -> None:
    prompt = ids(text)
    whole = backend.step([Row(0, 0, prompt, 1)]).copy()
    backend.step([Row(1, 0, ids("zzz"), 0)])
    backend.copy(0, 1, 5)
    again = backend.step([Row(1, 5, prompt[5:], 1)])
    np.testing.assert_allclose(again, whole, atol=2e-3)
    backend.truncate(0, 3)
    np.testing.assert_allclose(backend.step([Row(0, 3, prompt[3:], 1)]), whole, atol=2e-3)
    backend.truncate(0, 0)
    np.testing.assert_allclose(backend.step([Row(0, 0, prompt, 1)]), whole, atol=2e-3)


def test_cells_are_saved_and_restored(backend: LlamaCpp) -> None:
    prompt = ids("abcdefgh")
    whole = backend.step([Row(0, 0, prompt, 1)]).copy()
    backend.truncate(0, 7)
    cells = backend.save(0)
    assert backend.restore(2, cells, 7)
    np.testing.assert_allclose(backend.step([Row(2, 7, prompt[7:], 1)]), whole, atol=2e-3)
    with pytest.raises(ValueError, match="restore"):
        backend.restore(2, cells, 7)
    assert not backend.restore(3, b"not cells at all" * 8, 7)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Row(0, 0, [], 0)],
        [Row(4, 0, [5], 1)],
        [Row(-1, 0, [5], 1)],
        [Row(0, 1, [5], 1)],
        [Row(0, 0, [5], 2)],
        [Row(0, 0, [VOCAB], 1)],
        [Row(0, 0, [-1], 1)],
        [Row(0, 0, [5], 1), Row(0, 1, [5], 1)],
        [Row(0, 0, [5] * 65, 1)],
    ],
)
def test_what_would_end_the_process_is_refused_first(model: Model, rows: list[Row]) -> None:
    made = LlamaCpp(model, SMALL)
    with pytest.raises(ValueError):
        made.step(rows)
    made.step([Row(0, 0, [5], 1)])
    made.close()


def test_a_long_step_can_be_interrupted(model: Model) -> None:
    made = LlamaCpp(model, SMALL)
    made.step([Row(0, 0, ids("before"), 0)])
    want = made.step([Row(1, 0, ids("y" * 60), 1)]).copy()
    made.truncate(1, 0)

    class Impatient:
        """Sets the flag at once, as another thread would in the midst of the step."""

        def __call__(self, _: object) -> bool:
            return True

    made._abort = made._lib.ggml_abort_callback(Impatient())
    with pytest.raises(StepInterrupted):
        made.step([Row(0, 6, ids("z"), 0), Row(1, 0, ids("y" * 60), 1)])
    made._abort = made._lib.ggml_abort_callback(lambda _: False)
    np.testing.assert_allclose(made.step([Row(1, 0, ids("y" * 60), 1)]), want, atol=2e-3)
    made.step([Row(0, 6, ids("z"), 1)])
    made.close()


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "坏.gguf"
    bad.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(InputError, match="坏"):
        Model(bad)


def test_a_cache_type_that_does_not_fit_is_an_error_not_a_crash(model: Model) -> None:
    with pytest.raises(EdgeError, match="flash attention"):
        LlamaCpp(model, dataclasses.replace(SMALL, kv_type="q8_0", flash_attention=False))
    # Heads of 16 values do not fill a block of 32.
    with pytest.raises(InputError, match="context of"):
        LlamaCpp(model, dataclasses.replace(SMALL, kv_type="q8_0", flash_attention=True))


# -- the engine over it ----------------------------------------------------------------------------------


def serve(backend: LlamaCpp, prompts: list[str], *, together: bool, **given: object) -> list[str]:
    events: list[msg.Event] = []
    engine = Engine(backend, events.extend)
    params = Params(temperature=0.0, max_tokens=24, **given)  # type: ignore[arg-type]
    for key, prompt in enumerate(prompts):
        engine.submit(msg.Submit(key, prompt, params))
        while not together and engine.busy:
            engine.turn()
    engine.drain(1e9)
    while engine.turn():
        pass
    assert sum(isinstance(e, msg.Done) for e in events) == len(prompts)
    assert engine.cache.busy == 0
    for slot, length in enumerate(engine.cache.lengths):
        assert backend._lengths[slot] == length
        backend.truncate(slot, 0)
    return [
        "".join(e.text for e in events if isinstance(e, (msg.Delta, msg.Done)) and e.key == key)
        for key in range(len(prompts))
    ]


def test_batched_requests_get_what_each_would_get_alone(backend: LlamaCpp) -> None:
    prompts = [f"repeat the number {k} " * (1 + k % 3) for k in range(9)]
    alone = serve(backend, prompts, together=False)
    assert serve(backend, prompts, together=True) == alone
    assert len(set(alone)) > 5


def test_preemption_in_a_small_pool_loses_nothing(model: Model) -> None:
    prompts = [f"{k} " * 10 for k in range(6)]
    wide = LlamaCpp(model, SMALL)
    want = serve(wide, prompts, together=False, ignore_eos=True)
    wide.close()
    tight = LlamaCpp(model, dataclasses.replace(SMALL, context=64, capacity=64))
    assert serve(tight, prompts, together=True, ignore_eos=True) == want
    tight.close()


def test_s20_exactly_one_begin_of_text_token(model: Model) -> None:
    made = LlamaCpp(model, SMALL)
    for prompt in ("x", "<s>x"):
        assert prompt_tokens(made, prompt) == [1, *ids("x")]
    made.close()


def test_a_vector_is_the_mean_of_the_last_hidden_states(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LlamaCpp(model, SMALL)
    tokens = ids("the same words, twice")
    whole = backend.embed(tokens)
    assert whole.shape == (tiny_llama.WIDTH,) == (backend.info.embedding,)
    assert np.linalg.norm(whole) == pytest.approx(1, abs=1e-5)
    # The output matrix maps each state to its logits: so it maps their mean to the mean of the logits.
    [matrix] = [t.data for t in gguf.GGUFReader(model.path).tensors if t.name == "output.weight"]
    logits = backend.step([Row(0, 0, tokens, len(tokens))]).mean(axis=0)
    found = matrix @ whole
    assert found @ logits == pytest.approx(np.linalg.norm(found) * np.linalg.norm(logits), rel=1e-3)
    # However a long text is cut into batches, the vector is the same, and another order gives another.
    monkeypatch.setattr(llamacpp_embedding, "_BATCH", 7)
    other = LlamaCpp(model, SMALL)
    assert np.allclose(other.embed(tokens), whole, atol=1e-3)
    assert np.allclose(other.embed(tokens), whole, atol=1e-3)
    assert np.abs(other.embed(tokens[::-1]) - whole).max() > 0.01
    with pytest.raises(ValueError, match="embed"):
        backend.embed([])
    backend.close()
    other.close()


def test_vectors_need_memory_of_their_own(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory", lambda: hardware.Memory(2**20, 2**10))
    backend = LlamaCpp(model, SMALL)
    with pytest.raises(EdgeError, match="MiB are free"):
        backend.embed([5, 6])
    backend.close()


def write_bpe(folder: Path, letters: list[str], pre: str = "gpt-2") -> Path:
    """A model with a BPE vocabulary of these letters, whose texts are parted as `pre` says."""
    parts = tiny_gguf.Parts(tiny_llama.write(folder / "whole.gguf"))
    count = len(parts.metadata["tokenizer.ggml.tokens"])
    tokens = ["<s>", "</s>", *letters]
    tokens += [f"<{n}>" for n in range(count - len(tokens))]
    bpe = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": ["a b"]}
    bpe["token_type"] = [3] * 2 + [1] * (count - 2)
    rest = {"bos_token_id": 0, "eos_token_id": 1, "scores": None, "eot_token_id": None}
    path = folder / "bpe.gguf"
    path.write_bytes(
        parts.changed(**{f"tokenizer__ggml__{name}": item for name, item in (bpe | rest).items()})
    )
    read_whole(path)
    return path


@pytest.mark.parametrize("kept", ["abc", ""])
def test_a_bpe_vocabulary_without_byte_tokens_leaves_them_out_and_bounds_nothing(
    tmp_path: Path, kept: str
) -> None:
    whole = Model(write_bpe(tmp_path, list(byte_table())))
    assert whole.vocabulary.token_bytes > 0 and len(whole.vocabulary.encode("好\n", special=True)) == 4
    lacking = Model(write_bpe(tmp_path, list(kept))).vocabulary
    assert lacking.encode("好b\0\n c\xff" * 1000, special=True) == ([3, 4] * 1000 if kept else [])
    assert lacking.token_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("pre", ["deepseek-llm", "default"])
@pytest.mark.parametrize("part", ["a", " ", "1", "!", "_!", "1²", "，"])
def test_words_without_end_are_tokenized(tmp_path: Path, pre: str, part: str) -> None:
    """llama.cpp recurses along them, at 28,000 characters to the end of the process."""
    vocabulary = Model(write_bpe(tmp_path, list(byte_table()), pre)).vocabulary
    text = part * (200_000 // len(part))
    assert len(vocabulary.encode(text, special=True)) == len(text.encode("utf-8"))


@pytest.mark.parametrize("space", [False, True])
def test_characters_of_no_token_are_tokenized_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: bool
) -> None:
    """llama.cpp takes time in the square of their number: 31 s for 300,000."""
    parts = tiny_gguf.Parts(tiny_llama.write(tmp_path / "whole.gguf", added=[("ab", False)]))
    path = tmp_path / "spaced.gguf"
    path.write_bytes(parts.changed(tokenizer__ggml__add_space_prefix=space))
    vocabulary = Model(path).vocabulary
    whole, longest = vocabulary._ids, []

    def ids_of(text: str, *, special: bool) -> list[int]:
        longest.append(len(text))
        return whole(text, special=special)

    for text in (
        "\n" * 50_000,
        "ab" + "\n" * 2047 + "ab",
        "x\n\t" * 2000 + " ab",
        "好😀" * 5000 + "<|end|>a",
    ):
        want = whole(text, special=True)
        monkeypatch.setattr(vocabulary, "_ids", ids_of)
        assert vocabulary.encode(text, special=True) == want
        monkeypatch.undo()
    assert max(longest) < 8000
