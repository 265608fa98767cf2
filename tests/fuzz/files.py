"""Model files and what lies beside them: each loads, or is refused with a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from edge.artefact.find import candidates
from edge.artefact.gguf_header import GGML_TYPES
from edge.errors import EdgeError
from edge.loading.load_plan import Options, plan
from tests.fuzz import mutate
from tests.fuzz.runner import sentences
from tests.support import tiny_gguf

Draw = Callable[[Random], Any]
Check = Callable[[Any], None]


class _Gguf(tiny_gguf.Parts):
    """A small model that llama.cpp loads, taken apart, so that it can be put together otherwise."""

    def __init__(self, folder: Path) -> None:
        from tests.support import tiny_llama

        super().__init__(tiny_llama.write(folder / "whole.gguf"))

    def draw(self, rng: Random) -> bytes:
        """The header that stands before the tensors' data."""
        if rng.random() < 0.4:
            return mutate.data(rng, self.header)
        metadata, tensors = dict(self.metadata), list(self.tensors)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if rng.random() < 0.8:
                metadata[rng.choice(list(metadata))] = _metadata_value(rng)
            else:
                at = rng.randrange(len(tensors))
                name, shape, kind, offset = tensors[at]
                size = rng.choice((0, 1, 31, 32, 64, 2**31, 2**62, 2**63))
                tensors[at] = rng.choice(
                    [
                        (rng.choice(tensors)[0], shape, kind, offset),
                        (name, (size, *shape[1:]), kind, offset),
                        (name, shape, rng.choice((*GGML_TYPES, 4, 99)), offset),
                        (name, shape, kind, size),
                        (name, shape[:1], kind, offset),
                    ]
                )
        return tiny_gguf.gguf(metadata, tensors)


def _metadata_value(rng: Random) -> Any:
    # What the writer's types hold.
    number = rng.choice(
        [n for n in mutate.NUMBERS if n != 1e308 and (isinstance(n, float) or 0 <= n < 2**64)]
    )
    text = rng.choice(mutate.TEXTS).replace("\ud800", "\udcff")
    return rng.choice(
        (number, number, text, True, [number] * 3 if isinstance(number, float) else [1, 2, 3], [text] * 2, [])
    )


@contextlib.contextmanager
def gguf(folder: Path) -> Iterator[tuple[Draw, Check]]:
    """Headers and metadata of GGUF files, read and planned for."""
    model = _Gguf(folder)
    path = folder / "模型.gguf"

    def check(header: bytes) -> None:
        path.write_bytes(header + model.data)
        with sentences():
            plan(candidates(path)[0], Options(threads=1, device="cpu"))

    yield model.draw, check


@contextlib.contextmanager
def onnx(folder: Path) -> Iterator[tuple[Draw, Check]]:
    """A folder with an ONNX model: graph, edge.json, tokenizer, its configuration and the template."""
    from edge.backends.onnx_tokenizer import Vocabulary
    from tests.support import tiny_onnx

    tiny_onnx.publish(folder)
    stage = folder / "onnx"
    texts = ("edge.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    names = ["微小.onnx", *texts]
    whole = {name: (stage / name).read_bytes() for name in names}

    def draw(rng: Random) -> tuple[str, bytes]:
        name = rng.choice(names)
        if name.endswith(".json") and rng.random() < 0.7:
            return name, mutate.text_of(rng, mutate.inside(rng, json.loads(whole[name])))
        return name, mutate.data(rng, whole[name])

    def check(given: tuple[str, bytes]) -> None:
        name, data = given
        (stage / name).write_bytes(data)
        with sentences():
            artefact = candidates(folder, ("onnx",))[0]
            plan(artefact, Options(threads=1, device="cpu"))
            Vocabulary(stage, artefact.header.vocab_size).encode("a 好<|end|>", special=True)
        (stage / name).write_bytes(whole[name])

    yield draw, check


@contextlib.contextmanager
def native(folder: Path) -> Iterator[tuple[Draw, Check]]:
    """GGUF files that are not refused, in llama.cpp: loaded, a text tokenized, a step computed.

    In a process of its own each: what ends it is a value that must be refused before.
    """
    from edge.backends import llamacpp
    from edge.backends.base import Row

    llamacpp.library()
    model = _Gguf(folder)
    path = folder / "模型.gguf"

    def compute() -> None:
        loaded = llamacpp.Model(path)
        backend = llamacpp.LlamaCpp(
            loaded, llamacpp.Settings(slots=1, context=32, capacity=32, batch=32, threads=1)
        )
        tokens = backend.encode("a 好\n\x01\xff", special=True)[:16] or [0]
        backend.step([Row(0, 0, tokens, 1)])

    def check(header: bytes) -> None:
        path.write_bytes(header + model.data)
        try:
            candidates(path)
        except EdgeError:
            return
        if (child := os.fork()) == 0:
            signal.alarm(20)
            with contextlib.suppress(EdgeError):
                compute()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"llama.cpp ended with status {status}"

    yield model.draw, check
