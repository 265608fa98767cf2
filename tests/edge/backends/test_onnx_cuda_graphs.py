"""Decode steps as CUDA graphs: which shapes, when, and that they give what ordinary runs do.

Without a GPU its memory is the system's, and a CUDA graph is an ordinary run at its addresses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge.backends import onnx_cuda_graphs as graphs
from edge.backends.base import Candidates, Row
from edge.backends.onnx import Model, Onnx, Settings
from edge.machine import hardware
from tests.support import tiny_onnx
from tests.support.backends import Maker


@pytest.mark.parametrize(
    ("asked", "slots", "got"),
    [
        ((0, 1), 16, (0, 1)),
        ((5, 1), 16, (5, 1)),
        ((0, 3), 16, (0, 4)),
        ((13, 3), 16, (12, 4)),
        ((0, 9), 12, (0, 12)),
        ((3, 9), 12, (0, 12)),
        ((2, 8), 12, (2, 8)),
    ],
)
def test_rows_are_padded_to_a_power_of_two(asked: tuple[int, int], slots: int, got: tuple[int, int]) -> None:
    assert graphs.span(*asked, slots) == got


@pytest.mark.parametrize(
    ("longest", "context", "got"),
    [
        (1, 4096, 256),
        (256, 4096, 256),
        (257, 4096, 512),
        (3000, 4096, 4096),
        (3000, 3500, 3500),
        (20, 128, 128),
    ],
)
def test_a_mask_holds_for_many_steps(longest: int, context: int, got: int) -> None:
    assert graphs.width(longest, context) == got


def test_shapes_that_come_often_are_captured_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[tuple[Any, ...]] = []

    def capture(source: Any, shape: graphs.Shape, number: int) -> Any:
        captured.append((*dataclasses.astuple(shape), number))
        return captured[-1]

    monkeypatch.setattr(graphs, "CudaGraph", capture)
    monkeypatch.setattr(graphs, "_MOST", 2)
    source: Any = None
    kept = graphs.CudaGraphs(source, slots=4, context=1024)

    def find(first: int, count: int, longest: int, few: bool = True) -> Any:
        return kept.find(first, count, few, lambda first, count: [1] * (count - 1) + [longest])

    assert [find(0, 1, 10) for _ in range(graphs._AFTER)] == [None] * graphs._AFTER
    assert find(0, 1, 250) == (0, 1, 256, True, 1)
    assert find(0, 1, 100) is captured[0] and len(captured) == 1
    assert [find(0, 3, 300) for _ in range(graphs._AFTER + 1)][-1] == (0, 4, 512, True, 2)
    # A row without room for one token more is not computed as an idle row.
    assert find(0, 3, 1025) is None
    # Enough of them: another shape is not captured.
    assert [find(1, 1, 10) for _ in range(3 * graphs._AFTER)][-1] is None
    assert find(0, 1, 10) is captured[0]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Maker]:
    maker = Maker("onnx-device", tmp_path)
    yield maker
    maker.close()


def tokens(backend: Any, few: bool) -> list[list[int]]:
    """Greedy tokens of three texts, of which one ends earlier and one is begun later."""
    texts = {0: list(b"a first text"), 2: list(b"another"), 3: list(b"the last of them")}
    said: dict[int, list[int]] = {slot: [] for slot in texts}
    place = dict.fromkeys(texts, 0)
    todo = {slot: text for slot, text in texts.items() if slot != 3}
    for turn in range(24):
        if turn == 6:
            todo[3] = texts[3]
        if turn == 12:
            del todo[0]
        rows = [Row(slot, place[slot], todo[slot], 1, few) for slot in sorted(todo)]
        for row, found in zip(rows, backend.step(rows), strict=True):
            token = int(found.ids[0] if isinstance(found, Candidates) else np.argmax(found))
            place[row.slot] += len(row.tokens)
            todo[row.slot] = [token]
            said[row.slot].append(token)
    return list(said.values())


@pytest.mark.parametrize("few", [True, False])
def test_captured_steps_give_the_same_tokens(device: Maker, tmp_path: Path, few: bool) -> None:
    setting = Settings(slots=4, context=128, device="cpu", cuda_graphs=False)
    plain = Onnx(Model(tiny_onnx.write(tmp_path / "plain")), setting)
    want = tokens(plain, few=False)
    backend: Any = device()
    ran: list[int] = []
    replay = backend._replay
    backend._replay = lambda graph, *given: ran.append(graph.shape.count) or replay(graph, *given)
    assert tokens(backend, few) == want
    assert {1, 2, 4} & set(ran) and len(ran) > 10
    assert backend.info.settings["cuda_graphs"] == "decode steps"
    assert plain.info.settings["cuda_graphs"] == "none: switched off"
    plain.close()


def test_prompts_run_in_few_sizes_and_give_the_same_logits(device: Maker, tmp_path: Path) -> None:
    """Beginnings alone and together, later chunks, and one that the end of its context leaves no padding."""
    plain = Onnx(
        Model(tiny_onnx.write(tmp_path / "plain")), Settings(slots=4, context=128, batch=64, device="cpu")
    )
    backend: Any = device()
    widths: list[int] = []
    run = backend._run
    backend._run = lambda one: widths.append(one.width) or run(one)
    text = [7 * n % 250 for n in range(128)]
    steps = [
        [Row(0, 0, text[:13], 1), Row(1, 0, text[:11], 1), Row(3, 0, text[:30], 0)],
        [Row(0, 13, text[13:54], 1), Row(1, 11, text[11:12], 1), Row(3, 30, text[30:33], 3)],
        [Row(0, 54, text[54:111], 1), Row(1, 12, text[12:17], 2)],
        [Row(0, 111, text[111:], 1), Row(1, 17, text[17:18], 1), Row(3, 33, text[33:34], 1)],
    ]
    for rows in steps:
        want, got = plain.step(rows), backend.step(rows)
        for one, other in zip(want, got, strict=True):
            np.testing.assert_allclose(other, one, atol=1e-5)
    assert [width for width in widths if width > 1] == [16, 32, 48, 4, 64, 6, 17]
    plain.close()


def test_a_step_that_cannot_be_captured_is_run_and_said(
    device: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Any = device()
    want = tokens(backend, few=True)
    other = device(slots=5)

    def fail(*given: Any) -> Any:
        raise RuntimeError("the GPU's memory\nis full")

    monkeypatch.setattr(graphs.CudaGraph, "run", fail)
    assert tokens(other, few=True) == want
    assert other.info.settings["cuda_graphs"] == "none: the GPU's memory is full"


@pytest.mark.gpu
def test_a_gpu_replays_what_it_would_have_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hardware.gpus():
        pytest.skip("needs a CUDA GPU")
    monkeypatch.setattr(graphs, "_AFTER", 1)
    model = Model(tiny_onnx.write(tmp_path, candidates=16, dtype="float16"))
    said = []
    for capture in (False, True):
        for few in (True, False):
            backend = Onnx(model, Settings(slots=4, context=128, device="cuda", cuda_graphs=capture))
            said.append(tokens(backend, few))
            assert backend.info.settings["cuda_graphs"] == (
                "decode steps" if capture else "none: switched off"
            )
            backend.close()
    assert said == [said[0]] * 4
