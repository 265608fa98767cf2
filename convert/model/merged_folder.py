"""An adapter and its base, or a model alone, as one folder: weights, configuration, tokenizer, template."""

from __future__ import annotations

from pathlib import Path

from convert.model import chat_format
from convert.model.dequantized_base import DequantizedBase
from convert.model.hf_folder import SHARD, check_folder
from convert.model.lora_adapter import (
    Adapter,
    check_fits,
    find_base,
    known_adapter,
    load_format,
    read_adapter,
)
from convert.model.merged_weights import MergedWeights
from edge.artefact import json_file, manifest
from edge.errors import InputError

_PACKAGES = ("torch", "bitsandbytes", "safetensors")


def known_model(folder: Path) -> manifest.Manifest:
    """What is known of the model in `folder`: its edge.json, or what its own files say."""
    if (folder / manifest.FILE).is_file():
        return manifest.read(folder)
    form = chat_format.load(folder, plain=True)
    return manifest.Manifest(
        "model",
        folder.resolve().name,
        base_model=folder.resolve().name,
        chat_template=form.digest,
        stop_ids=form.stop_ids,
    )


class MergedFolder:
    """adapter: its folder; None: the base alone. base: the model under it; None: the one that it names.

    dtype: of the merged weights. into: "nf4" adds to the dequantised weights that training saw, "original" to
    the base as it is; an adapter that was trained over 16-bit weights is added to these either way. Raises
    InputError for an adapter or base that cannot be used.
    """

    def __init__(self, adapter: Path | None, *, base: Path | None, dtype: str, into: str) -> None:
        if adapter is not None:
            self.record = known_adapter(adapter, base)
            self.adapter = read_adapter(adapter)
            self.base = check_folder(find_base(self.record, adapter))
            if base is not None:
                check_fits(self.adapter, self.base)
        else:
            assert base is not None
            self.base, self.adapter = check_folder(base), Adapter(base, base, {}, {})
            self.record = known_model(base)
        self.folder = adapter or self.base.path
        # Without settings: as it is.
        dequantised = DequantizedBase(self.record.settings if into == "nf4" else {})
        self.weights = MergedWeights(self.base, self.adapter, dtype, dequantised)
        self._settings = {
            "dtype": dtype,
            "into": into if self.record.settings.get("quantized") else "original",
        }

    @property
    def into(self) -> str:
        return self._settings["into"]

    def write(self, target: Path, *, shard: int = SHARD) -> dict[str, float]:
        """Fill `target`, files of at most `shard` bytes, and write its manifest; returns the weights' drift.

        Raises InputError where neither adapter nor base has the template that the adapter was trained with,
        EdgeError for values that do not fit into the type.
        """
        chat_format.write_generation_config(self.base.path, target, self.record.stop_ids)
        form = load_format(self.folder, self.base.path)
        if form.digest != self.record.chat_template:
            raise InputError(
                f"{self.folder}: the chat template is not the one it was trained with",
                "train again, or put it back",
            )
        source = self.folder if (self.folder / "tokenizer.json").is_file() else self.base.path
        chat_format.copy_tokenizer(source, target, form.source)
        self.weights.write(target, shard)
        json_file.write(target / "config.json", self.weights.config)
        drift = self.weights.drift()
        settings = {**self._settings, "drift": drift}
        manifest.write(
            target, self.record.child("merged", self.folder, settings=settings, packages=_PACKAGES)
        )
        return drift
