"""A peft adapter read for merging: low-rank updates, DoRA's magnitudes, and tensors that were trained whole.

LoRA    W' = W + s B A,  s = alpha / r, or alpha / sqrt(r) rank-stabilised (arXiv:2312.03732)
DoRA    W' = m / ||W + s B A|| * (W + s B A), the norm over each output's row (arXiv:2402.09353)
whole   W' = what the adapter holds (modules_to_save, biases, embeddings of added tokens)
tokens  W'[i] = what the adapter holds for the tokens i (trainable_token_indices)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from convert.model import chat_format
from convert.model.dequantized_base import Rows, spans
from convert.model.hf_folder import AdapterTypes, Folder, StoredTensor, check_safetensors, shell
from edge.artefact import json_file, manifest
from edge.errors import InputError

_LOW_RANK = re.compile(r"(?P<layer>.+)\.lora_(embedding_)?(?P<part>A|B)(\.weight)?")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
# Beside the tables of a model with added tokens peft also writes its wrappers' views of them.
_VIEW = re.compile(r".+\.(modules_to_save|original_module)\.weight")
_MAGNITUDE = re.compile(r"(?P<layer>.+)\.lora_(?P<part>magnitude_vector)(\.weight)?")
_AGAIN = "train again: edge train"
CONFIG = "adapter_config.json"
CHECKPOINT_WEIGHTS = "trained.safetensors"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Lora:
    """One layer's update. a: (rank, inputs), b: (outputs, rank). magnitude: (outputs,) with DoRA.

    embedding: the layer is a table of (inputs, outputs), as embeddings are.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    embedding: bool = False

    def delta(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The low-rank update of some rows, or of all, in float32."""
        if self.embedding:
            return self.scaling * (self.b.float() @ self.a[:, start:stop].float()).T
        return self.scaling * (self.b[start:stop].float() @ self.a.float())

    def onto(self, rows: Rows) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """A function of some of the base's rows and the number of the first that gives the trained rows.

        All in float32. rows: the base's, for norms that go over all of them.
        """

        def plain(old: torch.Tensor, start: int) -> torch.Tensor:
            return old + self.delta(start, start + len(old))

        if self.magnitude is None:
            return plain
        magnitude = self.magnitude.float()
        if not self.embedding:

            def normed(old: torch.Tensor, start: int) -> torch.Tensor:
                changed = plain(old, start)
                norms = torch.linalg.norm(changed, dim=1)
                return changed * (magnitude[start : start + len(old)] / norms)[:, None]

            return normed
        squares = torch.zeros(self.shape[1])
        for start, stop in spans(self.shape):
            squares += plain(rows(start, stop).float(), start).square().sum(0)
        factor = magnitude / squares.sqrt()
        return lambda old, start: plain(old, start) * factor

    @property
    def shape(self) -> tuple[int, int]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.embedding else shape


@dataclass
class Adapter:
    """updates: by the name of the base's tensor. whole: name -> key in `weights`, read when it is needed.

    stored: what `weights` holds, by key. tokens: name of a table -> the tokens and their rows, which take the
    place of those of the table.
    """

    folder: Path
    weights: Path
    config: dict[str, Any]
    stored: dict[str, StoredTensor]
    updates: dict[str, Lora] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, tuple[list[int], torch.Tensor]] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` that the adapter holds whole."""
        with safe_open(self.weights, framework="pt") as file:
            return file.get_tensor(self.whole[name])

    def rows(self) -> int:
        """Rows of the embeddings or the head that it holds whole; 0 without."""
        names = (self.whole[name] for name in (EMBEDDINGS, HEAD) if name in self.whole)
        return next((self.stored[name].shape[0] for name in names), 0)

    @property
    def names(self) -> set[str]:
        """Every tensor of the base that it changes."""
        return set(self.updates) | set(self.whole) | set(self.tokens)

    def with_tokens(self, name: str, rows: Rows) -> Rows:
        """`rows` of the table `name` with those that were trained by themselves in their place."""
        if name not in self.tokens:
            return rows
        indices, values = self.tokens[name]
        places = torch.tensor(indices)

        def replaced(start: int, stop: int) -> torch.Tensor:
            table = rows(start, stop)
            here = (places >= start) & (places < stop)
            if here.any():
                table = table.float()
                table[places[here] - start] = values[here].float()
            return table

        return replaced


def scaling(config: dict[str, Any], layer: str) -> float:
    """s of a layer, by adapter_config.json."""

    def of(pattern: str, default: str) -> float:
        # As peft does it: the first pattern that matches the end of a layer's name.
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", layer):
                return float(value)
        return float(config.get(default, 8))  # peft's own default

    rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`. Raises InputError for what is none, or cannot be merged."""
    path, weights = folder / CONFIG, folder / "adapter_model.safetensors"
    if not weights.is_file() and (folder / CHECKPOINT_WEIGHTS).is_file():
        weights = folder / CHECKPOINT_WEIGHTS
    if not path.is_file() or not weights.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError(
                f"{folder} has its adapter as *.bin (pickle), which can run code when it is read",
                "if you trust where it comes from, load it with peft and save_pretrained it as safetensors",
            )
        raise InputError(f"{folder} lacks {path.name} or {weights.name}", _AGAIN)
    config = json_file.read(path, hint=_AGAIN, types=AdapterTypes)
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{path}: an adapter of the type {config.get('peft_type')!r} cannot be merged",
            "only LoRA and DoRA can",
        )
    for key in ("fan_in_fan_out", "lora_bias", "target_parameters"):
        if config.get(key):
            raise InputError(f"{path}: {key} is {config[key]!r}, which cannot be merged")
    adapter = Adapter(folder, weights, config, check_safetensors(weights))
    layers: dict[str, dict[str, torch.Tensor]] = {}
    tables: set[str] = set()
    with safe_open(weights, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            name = key.removeprefix("base_model.model.").replace(".default.", ".")
            name = name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")
            if _VIEW.fullmatch(name):
                continue
            if match := _TOKENS.fullmatch(name):
                adapter.tokens[f"{match[1]}.weight"] = _tokens(config, match[1], file.get_tensor(key), path)
            elif match := _LOW_RANK.fullmatch(name) or _MAGNITUDE.fullmatch(name):
                layers.setdefault(match["layer"], {})[match["part"]] = file.get_tensor(key)
                if "embedding_" in name:
                    tables.add(match["layer"])
            elif "lora_" in name:
                raise InputError(f"{weights}: {key} is no weight of LoRA or DoRA that can be merged")
            else:
                adapter.whole[name] = key
    for layer, parts in layers.items():
        a, b = parts.get("A"), parts.get("B")
        if a is None or b is None or a.dim() != 2 or a.shape[0] != b.shape[-1]:
            raise InputError(
                f"{weights}: the two halves of {layer} do not fit", "the file is damaged: train again"
            )
        scale, magnitude = scaling(config, layer), parts.get("magnitude_vector")
        adapter.updates[f"{layer}.weight"] = Lora(a, b, scale, magnitude, layer in tables)
    return adapter


def _tokens(
    config: dict[str, Any], layer: str, values: torch.Tensor, path: Path
) -> tuple[list[int], torch.Tensor]:
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if f".{layer}".endswith(f".{name}")), None)
    if (
        not isinstance(given, list)
        or len(given) != len(values)
        or any(type(token) is not int for token in given)
    ):
        raise InputError(
            f"{path}: trainable_token_indices does not name the {len(values)} tokens that {layer} holds",
            "the file is damaged: train again",
        )
    return given, values


def check_fits(adapter: Adapter, base: Folder) -> None:
    """Raise InputError where the low-rank updates of `adapter` are for another model than `base`."""
    for name, lora in adapter.updates.items():
        stored = base.tensors.get(name)
        if stored is None or stored.shape != lora.shape:
            there = f"the shape {stored.shape}" if stored else "no such tensor"
            raise InputError(
                f"{adapter.folder}: {name} has the shape {lora.shape} there, {base.path} has {there}",
                "the adapter belongs to another model: --base PATH names its own",
            )


def known_adapter(folder: Path, base: Path | None = None, *, checkpoint: bool = False) -> manifest.Manifest:
    """What is known of an adapter: its edge.json, or what one that was trained elsewhere says of its base.

    base: the model under it, in place of the one that it names. checkpoint: one of a training may be taken
    too. Raises InputError for a folder of another
    stage, or an adapter that names no base.
    """
    if (folder / manifest.FILE).is_file() or not (folder / CONFIG).is_file():
        known = manifest.read(folder)
        if known.stage not in ("adapter", "checkpoint" if checkpoint else ""):
            raise InputError(
                f"{folder} is a {known.stage}, not an adapter", "give the run folder of edge train"
            )
        if base is not None:
            known.settings["model_name_or_path"] = str(base)
            known.parents = [{**parent, "path": str(base)} for parent in known.parents]
        return known
    path = folder / CONFIG
    given = json_file.read(path, hint=_AGAIN, types=AdapterTypes).get("base_model_name_or_path")
    name = str(base or given or "")
    known = manifest.Manifest("adapter", folder.resolve().name, name, settings={"model_name_or_path": name})
    form = load_format(folder, find_base(known, folder))
    known.chat_template, known.stop_ids = form.digest, form.stop_ids
    return known


def load_format(adapter: Path, base: Path, *, parse_control_tokens: bool = False) -> chat_format.ChatFormat:
    """Tokenizer and chat template of an adapter: its own, or its base's where it has none.

    An adapter that plain text was trained into may have no template at all.
    """
    try:
        return chat_format.load(adapter, parse_control_tokens=parse_control_tokens)
    except InputError:
        return chat_format.load(base, adapter=adapter, plain=True, parse_control_tokens=parse_control_tokens)


def find_base(known: manifest.Manifest, adapter: Path) -> Path:
    """The base's folder by the adapter's manifest. Raises InputError where it is gone or was changed."""
    parent = known.parents[0] if known.parents else {"path": "", "digest": ""}
    name = str(known.settings.get("model_name_or_path", ""))
    folder = next((Path(path) for path in (parent["path"], name) if path and Path(path).is_dir()), None)
    if folder is None:
        from convert.model import hub

        if not hub.is_hub_id(name):
            ours = (adapter / manifest.FILE).is_file()
            key = (
                f"{manifest.FILE}: model_name_or_path"
                if ours
                else "adapter_config.json: base_model_name_or_path"
            )
            raise InputError(
                f"{adapter / key} is {name!r}, and there is no such model",
                f"give the model that it was trained on: edge merge {shell(adapter)} --base PATH",
            )
        folder = hub.resolve(name, known.settings.get("model_revision"), known.settings.get("cache_dir"))
    if parent["digest"]:
        now = manifest.read(folder).digest
        if now != parent["digest"]:
            raise InputError(
                f"{folder} is not the base that {adapter} was trained on: its digest is {now[:19]}..., "
                f"not {parent['digest'][:19]}...",
                "put that base back, or train again",
            )
    return folder
