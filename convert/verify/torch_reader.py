"""A transformers folder, or an adapter over its base, as a stage that is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from convert.model import chat_format
from convert.model.hf_folder import read_json
from convert.verify.reader import Logits, Reader
from edge.artefact import manifest


class TorchReader(Reader):
    """A transformers folder; or an adapter, computed over the weights that its training saw."""

    def __init__(self, path: Path) -> None:
        adapter = (path / "adapter_config.json").is_file()
        self.path = path
        self.known = manifest.read(path) if (path / manifest.FILE).is_file() else None
        if adapter:
            from convert.model.lora_adapter import find_base, known_adapter, words

            self.known = known_adapter(path)
            self._base = find_base(self.known, path)
            form = words(path, self._base)
        else:
            form = chat_format.load(path)
        super().__init__(form.source, form.bos, form.eos, self.known.thinking if self.known else None)
        self._form = form
        self.stage = self.known.stage if self.known else "model"
        # As serving has it: what the stage says of itself, else what its files say.
        self.stop_ids = frozenset(self.known.stop_ids if self.known else ()) or frozenset(form.stop_ids)
        self._model: Any = None
        if adapter:
            assert self.known is not None
            self._adapter: Path | None = path
            self.kind = "NF4 + LoRA" if self.known.settings.get("quantized") else "base + LoRA"
        else:
            self._base, self._adapter, self.slowness = path, None, 1
            config = read_json(path / "config.json")
            self.kind = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        config = read_json(self._base / "config.json")
        self.vocab = int((config.get("text_config") or config).get("vocab_size", 0))

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._form.encode(texts)

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [self._form.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]

    def logits(self, ids: list[int]) -> Logits:
        return next(self.all_logits([ids], [len(ids)]))

    def all_logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[Logits]:
        return (found.numpy() for found in self.model().logits(rows, last))

    def greedy(self, ids: list[int], count: int) -> list[int] | None:
        from convert.model.layerwise import is_large

        # Each token would read all of its weights.
        if is_large(self._base):
            return None
        found: list[int] = self.model().greedy(ids, count, self.stop_ids)
        return found

    def model(self) -> Any:
        """The loaded model (convert.model.reference.TorchModel)."""
        if self._model is None:
            from convert.model.layerwise import load

            self._model = load(self._base, self._adapter)
        return self._model

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = None
