"""A transformers folder, checked before anything heavy is imported: config, whole safetensors, tokenizer.

Weights are safetensors only: no pickle is read, no code from a repository is run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from edge.artefact import json_file, manifest
from edge.errors import InputError

INDEX = "model.safetensors.index.json"
SHARD = 2 * 2**30  # bytes of a file of weights that is written, if no single tensor is larger
# What a model needs; subfolders (other formats, original checkpoints) and pickles stay where they are.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*", "README.md")
# Below so many parameters four bits cost more than they gain; see docs/decisions.md.
SMALL = 1_000_000_000
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What names of quantised models end with.
_QUANTISED = re.compile(r"(?i)(-unsloth)?-(bnb-[48]bit|awq(-int4)?|gptq(-int[48])?|int[48]|[48]bit|fp8)$")
_SAFETENSORS_HEADER = 100 * 2**20  # the format's own limit
_SAFETENSORS_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


Count = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
_Ids = int | list[int] | None


class _Types(msgspec.Struct):
    """Types of what is read of config.json, here or by transformers; other keys are left to their model."""

    architectures: list[str] | None = None
    auto_map: dict[str, str | list[str | None]] | None = None
    quantization_config: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: _Ids = None
    eos_token_id: _Ids = None
    pad_token_id: _Ids = None
    head_dim: Count | None = None
    hidden_size: Count | None = None
    max_position_embeddings: Count | None = None
    num_attention_heads: Count | None = None
    num_hidden_layers: Count | None = None
    num_key_value_heads: Count | list[int] | None = None
    vocab_size: Count | None = None


class AdapterTypes(msgspec.Struct):
    """Types of what is read of adapter_config.json."""

    r: Count = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, float] | None = None
    base_model_name_or_path: str | None = None


class _Config(_Types):
    model_type: str | None = None
    text_config: _Types | None = None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies. dtype: the format's name of its type, such as "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Folder:
    """A transformers folder that was checked. weights: its safetensors files, all of them whole.

    tensors: what they hold, by name.
    """

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: dict[str, StoredTensor]


def parameters(weights: int, config: dict[str, Any]) -> int:
    """How many numbers `weights` bytes hold in the type that a model's config.json names: 32 bits, or 16."""
    return weights // (4 if str(config.get("dtype") or config.get("torch_dtype")) == "float32" else 2)


def shell(value: str | Path) -> str:
    """`value` as one word of a command line that can be pasted."""
    return subprocess.list2cmdline([str(value)]) if os.name == "nt" else shlex.quote(str(value))


def stage_folder(given: Path, stage: str) -> Path:
    """The folder of `stage`, "adapter" or "merged", of the run `given`; `given` where it is one itself.

    Raises InputError for a run without one. A path that does not exist is left to whoever reads it.
    """
    marker, name, command = {
        "adapter": ("adapter_config.json", "adapter", "edge train CONFIG.yaml"),
        "merged": ("config.json", "merged model", f"edge merge {shell(given)}"),
    }[stage]
    # The files of a run's own folder are links to those of its stage.
    if (given / marker).is_file() and not (given / stage / manifest.FILE).is_file():
        return given
    if given.is_dir() and not (given / stage).is_dir():
        if stage == "adapter" and (given / "merged" / manifest.FILE).is_file():
            raise InputError(
                f"{given} has no adapter: its training changed the weights themselves",
                f"{given / 'merged'} is the whole model: edge export gguf {shell(given)}",
            )
        raise InputError(f"{given} has no {name}", f"make it: {command}")
    return given / stage


def converts(what: str, where: str | Path) -> str:
    """The command that lets transformers rewrite `where` (a folder or a hub id) with its `what` class."""
    load, save = f"t.{what}.from_pretrained(sys.argv[1])", "save_pretrained(sys.argv[2])"
    code = f"import sys, transformers as t; {load}.{save}"
    return f'python -c "{code}" {shell(where)} {shell(Path(where).name + "-converted")}'


@contextlib.contextmanager
def loadable(folder: Path) -> Iterator[None]:
    """What transformers cannot load within the block becomes an InputError that names the folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder} cannot be loaded: {first}", "get the model again: edge pull") from error


def check_folder(folder: Path, *, shown: str = "") -> Folder:
    """Check that `folder` is a causal language model of transformers: config, whole safetensors, tokenizer.

    shown: what messages call it. Raises InputError that names the file and what to do.
    """
    shown = shown or str(folder)
    if not (folder / "config.json").is_file():
        hint = "give a folder with config.json, tokenizer.json and *.safetensors"
        if any(folder.glob("*.gguf")):
            hint = "it has a GGUF file, which can be served; training needs a transformers folder"
        elif (folder / "adapter_config.json").is_file():
            hint = "it is an adapter: give the model that it belongs to"
        raise InputError(f"{shown} has no config.json: it is no transformers folder", hint)
    config = read_config(folder)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "?")
        whole = _unquantised(folder, config, shown)
        raise InputError(
            f"{shown} is quantised already ({method})",
            "give the 16-bit model" + (f", {whole} by its files" if whole else "") + ": training quantises "
            "it itself, and an adapter that was trained over this one takes it as --base",
        )
    weights = _weights(folder, shown)
    tensors: dict[str, StoredTensor] = {}
    for path in weights:
        tensors |= check_safetensors(path)
    layers = (config.get("text_config") or config).get("num_hidden_layers") or 0
    if layers > len(tensors):
        raise InputError(
            f"{folder / 'config.json'}: num_hidden_layers is {layers:,}, the weights are "
            f"{len(tensors):,} tensors",
            "get the model again",
        )
    if not (folder / "tokenizer.json").is_file():
        files = f"into it, from {converts('AutoTokenizer', folder)}"
        raise InputError(f"{shown} has no tokenizer.json", f"put tokenizer.json {files}")
    return Folder(folder, config, weights, tensors)


def _unquantised(folder: Path, config: dict[str, Any], shown: str) -> str:
    """The model that a quantised one was made from, by its files or its hub id; "" where none tells."""
    named = [*_card_bases(folder), config.get("_name_or_path"), shown if Path(shown) != folder else None]
    for name in named:
        # Cards written by hand have a link.
        whole = _QUANTISED.sub("", re.sub(r"^https?://[^/]+/", "", str(name or "")).rstrip("/"))
        if _HUB_ID.fullmatch(whole) and whole != shown:
            return whole
    return ""


def _card_bases(folder: Path) -> list[Any]:
    """`base_model` of the model card's header."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8-sig", errors="replace") if readme.is_file() else ""
    try:
        card = yaml.safe_load(text.split("\n---", 1)[0]) if text.startswith("---\n") else None
    except (yaml.YAMLError, RecursionError):
        card = None
    bases = card.get("base_model") if isinstance(card, dict) else None
    return bases if isinstance(bases, list) else [bases]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`. Raises InputError that names the key of a value of the wrong type or size."""
    config = json_file.read(folder / "config.json", required=True, types=_Config)
    if not config.get("model_type"):
        raise InputError(f"{folder / 'config.json'} names no model_type", "get the model again")
    return config


def _weights(folder: Path, shown: str) -> tuple[Path, ...]:
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return (single,)
    if index.is_file():
        names = json_file.read(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{index} has no weight_map", "get the model again")
        paths = tuple(folder / str(name) for name in sorted(set(names.values())))
        missing = [path.name for path in paths if not path.is_file() or path.parent != folder]
        if missing:
            raise InputError(
                f"{shown} lacks {', '.join(missing)}", "the download is not complete: get it again"
            )
        return paths
    if any(folder.glob("*.bin")):
        raise InputError(
            f"{shown} has its weights as *.bin (pickle), which can run code when it is read",
            "if you trust where it comes from, convert it: " + converts("AutoModelForCausalLM", folder),
        )
    raise InputError(f"{shown} has no model.safetensors", "get the model again, with its weights")


def check_safetensors(path: Path) -> dict[str, StoredTensor]:
    """What `path` holds. Raises InputError unless native code can be given its header.

    Every tensor has a known type, a shape, and exactly its bytes; they fill the file without gap or overlap
    (github.com/huggingface/safetensors, "Format"). A download that was cut off is found by the same.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(8)
        if start.startswith(b"version "):
            raise InputError(f"{path} is a Git LFS pointer, not the weights", "run `git lfs pull` there")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_SAFETENSORS_HEADER, size - 8):
            raise InputError(f"{path} is damaged or no safetensors file", "get it again")
        try:
            tensors = json.loads(handle.read(length), object_pairs_hook=_no_twice)
            tensors.pop("__metadata__", None)
            spans = sorted(_span(name, entry) for name, entry in tensors.items())
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"{path} has a damaged header: {error}", "get it again") from error
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise InputError(
                f"{path} has a damaged header: {name!r} begins at {begin}, {end} was expected", "get it again"
            )
        end = stop
    if 8 + length + end != size:
        raise InputError(
            f"{path} has {size:,} bytes, its header says {8 + length + end:,}: it was cut off", "get it again"
        )
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()
    }


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands twice")
    return entries


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """(begin, end, name) of a tensor. Raises ValueError or TypeError for an entry that is none."""
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if kind not in _SAFETENSORS_BITS:
        raise ValueError(f"{name!r} has the unknown type {kind!r}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"{name!r} has the {what} {str(numbers)[:60]}")
    # Python's numbers do not overflow: a product beyond the file is simply not its bytes.
    bits = math.prod(shape) * _SAFETENSORS_BITS[kind]
    if len(offsets) != 2 or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise ValueError(f"{name!r} of {kind} {str(shape)[:60]} has the bytes {str(offsets)[:60]}")
    return offsets[0], offsets[1], name


def place(source: Path, target: Path, *, link: bool) -> None:
    """A hard link (large files that nobody edits) or, where that is not possible, a copy."""
    source = source.resolve()  # the hub's cache holds symbolic links
    if link:
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or a file system without links
            manifest.check_free(target.parent, source.stat().st_size)
    shutil.copyfile(source, target)
