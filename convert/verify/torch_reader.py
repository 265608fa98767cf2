"""A transformers folder, or an adapter over its base, as a stage that is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert.model import chat_format
from convert.model.hf_folder import read_config
from convert.verify.reader import Reader
from edge.artefact import manifest
from edge.backends.base import Logits

if TYPE_CHECKING:
    from convert.model.reference import TorchModel


class TorchReader(Reader):
    """A transformers folder; or an adapter, computed over the dequantised base that it was trained on.

    base: the model under an adapter; None: the one that it names.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        record = manifest.read(path) if (path / manifest.FILE).is_file() else None
        self._base, self._adapter = path, None
        if (path / "adapter_config.json").is_file():
            from convert.model.lora_adapter import find_base, known_adapter, load_format

            record = known_adapter(path, base)
            self._base, self._adapter = find_base(record, path), path
            self._format = load_format(path, self._base)
            bits = "8-bit" if record.settings.get("quantization_bit") == 8 else "NF4"
            kind = f"{bits} + LoRA" if record.settings.get("quantized") else "base + LoRA"
        else:
            self._format, self.slowness = chat_format.load(path, plain=True), 1
        config = read_config(self._base)
        if self._adapter is None:
            kind = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        super().__init__(
            path,
            record,
            stage=record.stage if record else "model",
            kind=kind,
            template=self._format.source,
            bos=self._format.bos,
            eos=self._format.eos,
            tokens=self._format.added,
            ends=self._format.stop_ids,
            vocab=int((config.get("text_config") or config).get("vocab_size", 0)),
        )
        self._model: TorchModel | None = None

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._format.encode(texts)

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [self._format.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]

    def special_tokens(self) -> list[str]:
        added = self._format.tokenizer.get_added_tokens_decoder()
        return [str(added[number].content) for number in sorted(added)]

    def all_logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[Logits]:
        return (logits.numpy() for logits in self._loaded().logits(rows, last))

    def greedy(self, ids: list[int], count: int) -> list[int] | None:
        from convert.model.layerwise import is_large

        # Each token would read all of its weights.
        return None if is_large(self._base) else self._loaded().greedy(ids, count, self.stop_ids)

    def greedy_of_all(self, rows: list[list[int]], count: int) -> list[list[int] | None]:
        from convert.model.layerwise import is_large

        if is_large(self._base):
            return [None] * len(rows)
        return [*self._loaded().greedy_of_all(rows, count, self.stop_ids)]

    def _loaded(self) -> TorchModel:
        if self._model is None:
            from convert.model.layerwise import load

            self._model = load(self._base, self._adapter)
        return self._model

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = None
