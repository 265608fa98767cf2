"""The Protocol's promises, for every backend: fake, llama.cpp, ONNX Runtime in the processor's and a device's
memory. The engine over them is in test_engine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge.backends.base import Backend, Row
from tests.support.backends import Maker

SLOTS, CONTEXT, BATCH = 4, 128, 64


@pytest.fixture
def backend(make: Maker) -> Backend:
    return make(slots=SLOTS, context=CONTEXT, batch=BATCH)


def ids(backend: Backend, text: str) -> list[int]:
    return backend.encode(text, special=False)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, atol=2e-3)


def test_text_goes_to_tokens_and_back(backend: Backend) -> None:
    text = "a  3\n你好👩‍🚀\0!"
    assert b"".join(backend.decode(token) for token in ids(backend, text)) == text.encode()
    assert all(0 <= token < backend.info.vocab for token in ids(backend, text))


def test_chunks_batches_and_outputs_give_the_same_logits(backend: Backend) -> None:
    prompt = ids(backend, "the quick brown fox")
    whole = backend.step([Row(0, 0, prompt, len(prompt))]).copy()
    assert whole.shape == (len(prompt), backend.info.vocab)
    assert whole.dtype == np.float32
    backend.step([Row(1, 0, prompt[:7], 0), Row(2, 0, ids(backend, "other"), 1)])
    rows = [Row(2, 5, ids(backend, "x"), 1), Row(1, 7, prompt[7:], 2), Row(3, 0, ids(backend, "third"), 0)]
    mixed = backend.step(rows)
    assert mixed.shape == (3, backend.info.vocab)
    close(mixed[1:], whole[-2:])


def test_slots_of_unequal_length_in_one_step(backend: Backend) -> None:
    texts = ["a", "abcdefgh", "the quick brown fox", "xyz"]
    alone = []
    for text in texts:
        alone.append(backend.step([Row(0, 0, ids(backend, text), 1)]).copy()[0])
        backend.truncate(0, 0)
    for slot, text in enumerate(texts):
        if len(text) > 1:
            backend.step([Row(slot, 0, ids(backend, text)[:-1], 0)])
    # In another order than the slots', with one that is not asked for its logits.
    rows = [
        Row(slot, len(texts[slot]) - 1, ids(backend, texts[slot])[-1:], int(slot != 1))
        for slot in (2, 0, 3, 1)
    ]
    close(backend.step(rows), [alone[slot] for slot in (2, 0, 3)])


def test_idle_slots_between_busy_ones_keep_their_tokens(backend: Backend) -> None:
    text = ids(backend, "abcdefgh")
    whole = backend.step([Row(1, 0, text, 1)]).copy()
    backend.truncate(1, 7)
    backend.step([Row(0, 0, ids(backend, "left"), 0), Row(3, 0, ids(backend, "right"), 0)])
    for at in range(40):
        backend.step([Row(3, 5 + at, text[:1], 1), Row(0, 4 + at, text[:1], 1)])
    close(backend.step([Row(1, 7, text[7:], 1)]), whole)


def test_a_full_slot_is_not_written_over_by_its_neighbours(backend: Backend) -> None:
    text = ids(backend, "ab" * (CONTEXT // 2))
    for at in range(0, CONTEXT - 1, 60):
        backend.step([Row(1, at, text[at : min(at + 60, CONTEXT - 1)], 0)])
    want = backend.step([Row(1, CONTEXT - 1, text[-1:], 1)]).copy()
    backend.step([Row(0, 0, text[:3], 0), Row(2, 0, text[:5], 0)])
    for at in range(3):
        backend.step([Row(0, 3 + at, text[:1], 1), Row(2, 5 + at, text[:1], 1)])
    backend.truncate(1, CONTEXT - 1)
    close(backend.step([Row(1, CONTEXT - 1, text[-1:], 1)]), want)


def test_copy_and_truncate(backend: Backend) -> None:
    prompt = ids(backend, "abcdefgh")
    whole = backend.step([Row(0, 0, prompt, 1)]).copy()
    backend.step([Row(1, 0, ids(backend, "zzz"), 0)])
    backend.copy(0, 1, 5)
    close(backend.step([Row(1, 5, prompt[5:], 1)]), whole)
    backend.truncate(0, 3)
    close(backend.step([Row(0, 3, prompt[3:], 1)]), whole)
    backend.truncate(0, 0)
    close(backend.step([Row(0, 0, prompt, 1)]), whole)
    for src, dst, n in ((0, 0, 1), (0, 1, 99)):
        with pytest.raises(ValueError):
            backend.copy(src, dst, n)
    with pytest.raises(ValueError):
        backend.truncate(0, 9)


def test_cells_are_saved_and_restored(backend: Backend) -> None:
    prompt = ids(backend, "abcdefgh")
    whole = backend.step([Row(0, 0, prompt, 1)]).copy()
    backend.truncate(0, 7)
    cells = backend.save(0)
    assert backend.restore(2, cells, 7)
    close(backend.step([Row(2, 7, prompt[7:], 1)]), whole)
    with pytest.raises(ValueError, match="restore"):
        backend.restore(2, cells, 7)


def test_vectors_of_texts_leave_the_slots_alone(backend: Backend) -> None:
    prompt = ids(backend, "abcdefgh")
    whole = backend.step([Row(0, 0, prompt, 1)]).copy()
    backend.truncate(0, 7)
    texts = [ids(backend, text) for text in ("a fish", "a fist", "quite another text, and a longer one " * 2)]
    vectors = [backend.embed(text) for text in texts]
    close(backend.step([Row(0, 7, prompt[7:], 1)]), whole)
    for text, vector in zip(texts, vectors, strict=True):
        assert (vector.shape, vector.dtype) == ((backend.info.embedding,), np.float32)
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
        close(backend.embed(text), vector)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    for bad in ([], [5] * (CONTEXT + 1), [backend.info.vocab]):
        if backend.info.kind != "fake":
            with pytest.raises(ValueError):
                backend.embed(bad)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Row(0, 0, [], 0)],
        [Row(SLOTS, 0, [5], 1)],
        [Row(-1, 0, [5], 1)],
        [Row(0, 1, [5], 1)],
        [Row(0, 0, [5], 2)],
        [Row(0, 0, [10**6], 1)],
        [Row(0, 0, [-1], 1)],
        [Row(0, 0, [5], 1), Row(0, 1, [5], 1)],
        [Row(0, 0, [5] * (BATCH + 1), 1)],
    ],
)
def test_what_would_end_the_process_is_refused_first(backend: Backend, rows: list[Row]) -> None:
    with pytest.raises(ValueError):
        backend.step(rows)
    backend.step([Row(0, 0, [5], 1)])
