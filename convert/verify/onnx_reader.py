"""An exported ONNX file as a stage that is compared, computed by the backend that serves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from convert.verify import stepping
from convert.verify.reader import Reader
from edge.artefact import find, json_file
from edge.backends.base import Logits
from edge.backends.onnx import Model, Onnx, Settings
from edge.machine import hardware

_CONTEXT = 1024
_KINDS = {4: "int4", 8: "int8", 16: "fp16", 32: "fp32"}


class OnnxReader(Reader):
    """An ONNX file with its tokenizer and template beside it. Raises InputError where one cannot be used."""

    slowness = 0

    def __init__(self, path: Path) -> None:
        self._model = Model(path)
        self._header, self._vocabulary = self._model.header, self._model.vocabulary
        bits = sorted(self._header.matrices) or [32]
        mixed = " mixed" if bits[:2] == [4, 8] else ""
        super().__init__(
            path,
            find.published(path),
            stage="onnx",
            kind=_KINDS.get(bits[0], f"int{bits[0]}") + mixed,
            template=self._model.template or "",
            bos=self._vocabulary.bos_text,
            eos=self._vocabulary.eos_text,
            tokens=self._vocabulary.added,
            ends=self._vocabulary.ends,
            vocab=self._header.vocab_size,
        )
        self._backend: Onnx | None = None

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self._vocabulary.encode(text, special=True) for text in texts]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [b"".join(map(self._vocabulary.decode, ids)).decode("utf-8", "replace") for ids in rows]

    def special_tokens(self) -> list[str]:
        tokens = json_file.read(self.path.parent / "tokenizer.json").get("added_tokens", [])
        return [str(token["content"]) for token in sorted(tokens, key=lambda token: token["id"])]

    def all_logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[Logits]:
        backend = self.load()
        return (stepping.logits(backend, ids, count) for ids, count in zip(rows, last, strict=True))

    def greedy(self, ids: list[int], count: int) -> list[int] | None:
        return stepping.greedy(self.load(), ids, count, self.stop_ids)

    def load(self) -> Onnx:
        """The session over the file, made once. Raises InputError where onnxruntime refuses the file."""
        if self._backend is None:
            settings = Settings(
                slots=1,
                context=min(_CONTEXT, self._header.context_length),
                threads=hardware.cpu_threads(),
                # A GPU takes files of 16 bits only.
                device="auto" if self._header.cache_type == "float16" else "cpu",
            )
            self._backend = Onnx(self._model, settings)
        return self._backend

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
        self._backend = None
