"""The weights of a merged model: an adapter added to its base, a few rows of a tensor at a time.

Each sum is computed in float32 and rounded once, to the output type. Tensors are mapped from their files, so
no second copy of a matrix is ever in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from convert.model import safetensors_io
from convert.model.dequantized_base import DTYPES, DequantizedBase, Rows, spans
from convert.model.hf_folder import Folder
from convert.model.lora_adapter import EMBEDDINGS, HEAD, Adapter
from edge.errors import EdgeError, InputError


class MergedWeights:
    """What is to be written of `base` with `adapter` on top of it, in `dtype`.

    dequantised: the base's weights as training saw them, or as they are. config: the base's config.json, as
    it holds for the merged model. Raises InputError where base and adapter do not fit together.
    """

    def __init__(self, base: Folder, adapter: Adapter, dtype: str, dequantised: DequantizedBase) -> None:
        # Squared norms over all changed layers: of the weights, of the updates, of what rounding took.
        self._weight = self._update = self._lost = 0.0
        # Everything else stays as the base has it: other readers know these keys.
        key = "dtype" if "dtype" in base.config or "torch_dtype" not in base.config else "torch_dtype"
        self.config: dict[str, Any] = {**base.config, key: dtype}
        self._base, self._adapter, self._dequantised = base, adapter, dequantised
        self._parts: dict[str, safetensors_io.Part] = {}
        self._sources: dict[str, tuple[Path, str]] = {}  # the base's file of a tensor, and its name there
        self._list(DTYPES[dtype])
        if self.config.get("tie_word_embeddings"):
            self._tie()
        self._grow()

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self._parts.values())

    def write(self, folder: Path, shard: int) -> None:
        """Write files of at most `shard` bytes. Raises EdgeError for values that do not fit into the type."""
        safetensors_io.write(folder, list(self._parts.values()), self._rows, shard)

    def drift(self) -> dict[str, float]:
        """Of what was written: "update" relative to the weights, "rounding" relative to the update."""
        return {
            "update": math.sqrt(self._update / self._weight) if self._weight else 0.0,
            "rounding": math.sqrt(self._lost / self._update) if self._update else 0.0,
        }

    def _list(self, dtype: torch.dtype) -> None:
        """The base's tensors; floating-point ones become `dtype`."""
        for name, stored in self._base.tensors.items():
            kind = safetensors_io.TYPES.get(stored.dtype)
            if kind is None:
                raise InputError(
                    f"{stored.file}: {name} is of the type {stored.dtype}, which cannot be merged",
                    "give the 16-bit model",
                )
            kind = dtype if kind.is_floating_point else kind
            self._parts[name] = safetensors_io.Part(name, stored.shape, kind)
            self._sources[name] = (stored.file, name)

    def _tie(self) -> None:
        """Write one table for tied embeddings, or two and undo the tie where they were trained apart."""
        adapter = self._adapter
        # A copy of the embeddings: readers tie it, and some refuse a second one.
        self._parts.pop(HEAD, None)
        # peft trains a copy of a table that is named alone, and leaves its twin as it was.
        apart = (set(adapter.updates) | set(adapter.whole)) & {EMBEDDINGS, HEAD}
        if apart and not adapter.config.get("ensure_weight_tying") and not _same_tables(adapter):
            self._parts[HEAD] = dataclasses.replace(self._parts[EMBEDDINGS], name=HEAD)
            self._sources[HEAD] = self._sources[EMBEDDINGS]
            self.config["tie_word_embeddings"] = False

    def _grow(self) -> None:
        """Take the shape of tables with added tokens from the adapter, which must hold each of them whole."""
        adapter, base = self._adapter, self._base.path
        tied = bool(self.config.get("tie_word_embeddings"))
        tables = [EMBEDDINGS] if tied else [EMBEDDINGS, HEAD]
        tokens, before = adapter.rows(), self._parts[EMBEDDINGS].shape[0]
        if tokens and tokens != before:
            lacking = [name for name in tables if name not in adapter.whole]
            if lacking:
                raise InputError(
                    f"{adapter.folder} has {tokens} tokens, {base} has {before}, and the adapter does not "
                    f"hold {lacking[0]} with the added ones",
                    "train again with modules_to_save: embed_tokens, lm_head",
                )
            self.config["vocab_size"] = tokens
        missing = sorted(adapter.names - set(self._parts) - ({HEAD} if tied else set()))
        if missing:
            raise InputError(f"{base} has no {missing[0]}, which the adapter changes", "train again")
        for name in tables:
            if tokens and name in adapter.whole:
                part = self._parts[name]
                self._parts[name] = dataclasses.replace(part, shape=(tokens, *part.shape[1:]))

    def _rows(self, part: safetensors_io.Part) -> Iterator[torch.Tensor]:
        """The rows of a merged tensor, some at a time."""
        name, adapter = part.name, self._adapter
        weight, rows = self._stored(name)
        lora = adapter.updates.get(name)
        for shape in (tuple(weight.shape), lora.shape if lora else part.shape):
            if shape != part.shape:
                raise InputError(
                    f"{adapter.folder}: {name} has the shape {shape} there, {part.shape} in the base",
                    "the adapter belongs to another model",
                )
        change = lora.onto(rows) if lora else None
        for start, stop in spans(part.shape):
            values = rows(start, stop)
            if change:
                old = values.float()
                values = change(old, start)
            if part.dtype.is_floating_point:
                exact, values = values, values.to(part.dtype)
                if not torch.isfinite(values).all():
                    raise EdgeError(
                        f"{name} does not fit into {part.dtype}, or contains NaN or infinity",
                        "--dtype bfloat16",
                    )
                if change:
                    self._weight += _square(old)
                    self._update += _square(exact - old)
                    self._lost += _square(exact - values.float())
            yield values

    def _stored(self, name: str) -> tuple[torch.Tensor, Rows]:
        """The tensor `name` without its low-rank update: as stored, and its rows as training saw them."""
        if name in self._adapter.whole:
            weight = self._adapter.read(name)
            rows: Rows = lambda start, stop: weight[start:stop]  # noqa: E731
        else:
            path, stored = self._sources[name]
            with safe_open(path, framework="pt") as file:
                weight = file.get_tensor(stored)
            rows = self._dequantised.rows(stored, weight)
        return weight, self._adapter.with_tokens(name, rows)


def _same_tables(adapter: Adapter) -> bool:
    """Whether the adapter holds embeddings and head whole, and they are one table."""
    if not {EMBEDDINGS, HEAD} <= set(adapter.whole):
        return False
    return set(adapter.tokens) != {HEAD} and torch.equal(adapter.read(EMBEDDINGS), adapter.read(HEAD))


def _square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2
