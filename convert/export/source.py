"""What is exported: a transformers folder, checked, with its chat template and its weights' size."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.model import chat_format
from convert.model.hf_folder import check_folder
from edge.artefact import manifest
from edge.errors import InputError

TEMPLATE = "chat_template.jinja"
_PACKAGES = ("edge", "llama-cpp-python", "torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Source:
    """The transformers folder that is exported, and what is known of it."""

    path: Path
    known: manifest.Manifest
    config: dict[str, Any]
    template: str
    weights: int

    @property
    def file_name(self) -> str:
        """The model's name as far as a file may be called so."""
        return re.sub(r'[\\/:*?"<>|\x00-\x1f]+', "-", self.known.name).strip(" .-") or "model"

    @property
    def whole(self) -> str:
        """The GGUF type that keeps the precision of the weights."""
        dtype = str(self.config.get("dtype") or self.config.get("torch_dtype") or "")
        return {"bfloat16": "BF16", "float32": "F32"}.get(dtype, "F16")

    def manifest(self, quant: str, file: Path, **settings: Any) -> manifest.Manifest:
        """The manifest of `file` in the type `quant`, without its verification."""
        settings = {"quant": quant, "file": file.name, **settings}
        made = self.known.child("gguf", self.path, settings=settings, packages=_PACKAGES)
        made.chat_template = manifest.text_digest(self.template)
        return made


def folders(given: Path) -> tuple[Path, Path]:
    """(what to export, where to) for a run or a transformers folder."""
    if (given / "config.json").is_file():
        return given, given / "gguf"
    if given.is_dir() and not (given / "merged").is_dir():
        raise InputError(f"{given} has no merged model", f"make it: edge merge {given}")
    return given / "merged", given / "gguf"


def open_source(path: Path) -> Source:
    """The folder to export, checked. Raises InputError where something is missing or was changed.

    A folder without edge.json was made elsewhere: its own files say where a turn ends.
    """
    if (path / manifest.FILE).is_file() or not (path / "config.json").is_file():
        known, kept = manifest.read(path), ""
    else:
        form = chat_format.load(check_folder(path).path)
        kept = form.source
        digest = manifest.text_digest(form.source)
        known = manifest.Manifest("model", path.resolve().name, chat_template=digest, stop_ids=form.stop_ids)
    path = path.resolve()
    # transformers 4 keeps the template in tokenizer_config.json.
    text = kept if kept and not (path / TEMPLATE).is_file() else read_template(path, known)
    config = read_json(path / "config.json")
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{path} has no *.safetensors file", "merge again: edge merge RUN")
    return Source(path, known, config, text, weights)


def read_template(source: Path, origin: manifest.Manifest) -> str:
    """The chat template, exactly. A model without one would be served as gibberish: refused."""
    path = source / TEMPLATE
    if not path.is_file():
        raise InputError(
            f"{source} has no {TEMPLATE}: the exported model would not know how a turn begins and ends",
            f"copy {TEMPLATE} from the base model into it, or merge again: edge merge RUN --overwrite",
        )
    text = path.read_text(encoding="utf-8")
    # As transformers reads it: line ends of Windows count as plain ones. The digest may be of either form.
    digests = {manifest.text_digest(text), manifest.file_digest(path)}
    if origin.chat_template is not None and origin.chat_template not in digests:
        raise InputError(
            f"{path} is not the template that edge.json names: it was changed after the merge",
            "merge again: edge merge RUN --overwrite",
        )
    return text


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", "merge again: edge merge RUN") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object", "merge again: edge merge RUN")
    return data
