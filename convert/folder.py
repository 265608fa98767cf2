"""A transformers folder, checked before anything heavy is imported: config, whole safetensors, tokenizer.

Weights are safetensors only: no pickle is read, no code from a repository is run.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.errors import InputError

INDEX = "model.safetensors.index.json"
# What a model needs; subfolders (other formats, original checkpoints) and pickles stay where they are.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*")
_SAFETENSORS_HEADER = 100 * 2**20  # the format's own limit


@dataclass(frozen=True)
class Folder:
    """A transformers folder that was checked. weights: its safetensors files, all of them whole."""

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]


def shell(value: str | Path) -> str:
    """`value` as one word of a command line that can be pasted."""
    return subprocess.list2cmdline([str(value)]) if os.name == "nt" else shlex.quote(str(value))


def converts(what: str, where: str | Path) -> str:
    """The command that lets transformers rewrite `where` (a folder or a hub id) with its `what` class."""
    load, save = f"t.{what}.from_pretrained(sys.argv[1])", "save_pretrained(sys.argv[2])"
    code = f"import sys, transformers as t; {load}.{save}"
    return f'python -c "{code}" {shell(where)} {shell(Path(where).name + "-converted")}'


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
    config = _json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{folder / 'config.json'} names no model_type", "get the model again")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "?")
        raise InputError(
            f"{shown} is quantised already ({method})", "give the 16-bit model: training quantises it itself"
        )
    weights = _weights(folder, shown)
    for path in weights:
        _check_safetensors(path)
    if not (folder / "tokenizer.json").is_file():
        files = f"into it, from {converts('AutoTokenizer', folder)}"
        raise InputError(f"{shown} has no tokenizer.json", f"put tokenizer.json {files}")
    return Folder(folder, config, weights)


def _weights(folder: Path, shown: str) -> tuple[Path, ...]:
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return (single,)
    if index.is_file():
        names = _json(index).get("weight_map")
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


def _check_safetensors(path: Path) -> None:
    """Raise InputError unless the file is as long as its header says (a download may have been cut)."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(8)
        if start.startswith(b"version "):
            raise InputError(f"{path} is a Git LFS pointer, not the weights", "run `git lfs pull` there")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_SAFETENSORS_HEADER, size - 8):
            raise InputError(f"{path} is damaged or no safetensors file", "get it again")
        try:
            tensors = json.loads(handle.read(length))
            tensors.pop("__metadata__", None)
            end = max(tensor["data_offsets"][1] for tensor in tensors.values())
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{path} has a damaged header: {error!r}", "get it again") from error
    if 8 + length + end != size:
        raise InputError(
            f"{path} has {size:,} bytes, its header says {8 + length + end:,}: it was cut off", "get it again"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}", "get the model again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object", "get the model again")
    return data
