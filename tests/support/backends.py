"""Backends of every kind over the tests' tiny models, made once for each setting and emptied for each use."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge.backends.base import Backend, Row
from edge.backends.fake import FakeBackend
from edge.engine.grammar import Constraint

Build = Callable[[dict[str, int]], Backend]


class Maker:
    """`maker(slots=4, context=128, batch=64)`: an empty backend of its kind.

    capacity: of a unified KV cache, where the kind has one; ONNX has a KV buffer for each slot.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.pools = kind in ("fake", "fake-gpu", "llamacpp")
        self._patch = pytest.MonkeyPatch()
        self._made: dict[tuple[tuple[str, int], ...], Backend] = {}
        if kind in ("fake", "fake-gpu"):
            # A GPU computes asynchronously: the engine has things to do meanwhile.
            overlaps = kind == "fake-gpu"
            self._build: Build = lambda given: FakeBackend(**given, overlaps=overlaps)  # type: ignore[arg-type]
        elif kind == "llamacpp":
            self._build = _llamacpp(folder)
        else:
            self._build = _onnx(folder, self._patch if kind == "onnx-device" else None)

    def __call__(self, **given: int) -> Backend:
        settings = {"slots": 4, "context": 128, "batch": 64, **given}
        if not self.pools:
            settings.pop("capacity", None)
        key = tuple(sorted(settings.items()))
        if key not in self._made:
            self._made[key] = self._build(settings)
        backend = self._made[key]
        for slot in range(backend.info.slots):
            backend.truncate(slot, 0)
        return backend

    def close(self) -> None:
        for backend in self._made.values():
            backend.close()
        self._patch.undo()


def _llamacpp(folder: Path) -> Build:
    pytest.importorskip("llama_cpp")
    from edge.backends.llamacpp import LlamaCpp, Model, Settings
    from tests.support import tiny_llama

    # S16: native code must open a path that is not ASCII.
    model = Model(tiny_llama.write(folder / "тест.gguf"))

    def build(given: dict[str, int]) -> Backend:
        size = {"capacity": given["slots"] * given["context"], **given}
        return LlamaCpp(model, Settings(**size))  # type: ignore[arg-type]

    return build


def _onnx(folder: Path, patch: pytest.MonkeyPatch | None) -> Build:
    """patch: the KV cache is allocated and copied as on a GPU, but in the system's memory."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from edge.backends import onnx, onnx_cuda_graphs, onnx_providers
    from edge.backends.onnx_kv_cache_cuda import DeviceKVCache
    from tests.support import tiny_onnx

    class OnTheCPU(DeviceKVCache):
        def __init__(self, runtime: Any, provider: str, device: str, **given: Any) -> None:
            super().__init__(runtime, provider, "cpu", **given)

    if patch is not None:
        open_session = onnx_providers.open_session
        patch.setattr(
            onnx_providers,
            "open_session",
            lambda *given, **more: dataclasses.replace(
                open_session(*given, **more), memory="host", no_graphs=""
            ),
        )
        patch.setattr(onnx, "DeviceKVCache", OnTheCPU)
        patch.setattr(onnx_cuda_graphs, "_AFTER", 1)
    # As for a GPU: with candidates, too.
    count = 64 if patch is not None else 0
    model = onnx.Model(tiny_onnx.write(folder, name=tiny_onnx.FILE, candidates=count))
    return lambda given: onnx.Onnx(model, onnx.Settings(**given, device="cpu"))  # type: ignore[arg-type]


def ids(backend: Backend, text: str) -> list[int]:
    return backend.encode(text, special=False)


def exactly(text: str) -> Constraint:
    """What makes any model say `text`."""
    return Constraint("regex", re.escape(text))


def only(backend: Backend, letters: str) -> dict[int, float]:
    """A bias that leaves a model nothing but `letters` to say."""
    return {ids(backend, letter)[0]: 1000.0 for letter in letters}


def counted(backend: Backend, patch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each step from now on."""
    steps: list[int] = []
    step = backend.step

    def count(rows: Sequence[Row]) -> Any:
        steps.append(sum(len(row.tokens) for row in rows))
        return step(rows)

    patch.setattr(backend, "step", count)
    return steps
