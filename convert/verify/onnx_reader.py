"""An exported ONNX file as a stage that `edge verify` compares, computed by the backend that serves it."""

from __future__ import annotations

from pathlib import Path

from convert.verify.onnx_quality import backend_logits
from convert.verify.reader import Logits, Reader
from edge.artefact import manifest
from edge.backends.base import Row
from edge.backends.onnx import Model, Onnx, Settings
from edge.errors import InputError
from edge.machine import hardware

_CONTEXT = 1024


class OnnxReader(Reader):
    """An ONNX file with its tokenizer and template beside it. Raises InputError where one cannot be used."""

    slowness = 0

    def __init__(self, path: Path) -> None:
        known = manifest.read(path.parent) if (path.parent / manifest.FILE).is_file() else None
        self.known = known if known is not None and path.name in known.files else None
        self._file = Model(path)
        if self._file.template is None:
            raise InputError(f"{path.parent} has no chat template", "export it again: edge export onnx RUN")
        header, self._vocabulary = self._file.header, self._file.vocabulary
        super().__init__(
            self._file.template,
            self._vocabulary.bos_text,
            self._vocabulary.eos_text,
            self.known.thinking if self.known else None,
        )
        self.path, self.stage, self.vocab = path, "onnx", header.vocab_size
        bits = min(header.matrices, default=32)
        self.kind = f"int{bits}" if bits < 16 else header.cache_type
        self.stop_ids = frozenset(self.known.stop_ids if self.known else ()) or self._vocabulary.ends
        self._backend: Onnx | None = None

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self._vocabulary.encode(text, special=True) for text in texts]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [b"".join(map(self._vocabulary.decode, ids)).decode("utf-8", "replace") for ids in rows]

    def logits(self, ids: list[int]) -> Logits:
        return backend_logits(self._loaded(), ids, 0)

    def greedy(self, ids: list[int], count: int) -> list[int] | None:
        backend = self._loaded()
        backend.truncate(0, 0)
        made: list[int] = []
        rest, at = ids, 0
        while len(made) < count and not (made and made[-1] in self.stop_ids):
            for begin in range(0, len(rest), backend.info.batch):
                piece = rest[begin : begin + backend.info.batch]
                logits = backend.step([Row(0, at, piece, 1)])
                at += len(piece)
            rest = [int(logits[-1].argmax())]
            made += rest
        return made

    def _loaded(self) -> Onnx:
        if self._backend is None:
            header = self._file.header
            settings = Settings(
                slots=1,
                context=min(_CONTEXT, header.context_length),
                threads=hardware.cpu_threads(),
                # A card takes files of 16 bits only.
                device="auto" if header.cache_type == "float16" else "cpu",
            )
            self._backend = Onnx(self._file, settings)
        return self._backend

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
        self._backend = None
