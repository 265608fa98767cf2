"""The transformers folder that an export starts from, checked, and its chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.model import chat_format
from convert.model.hf_folder import check_folder
from edge.artefact import manifest
from edge.artefact.find import TEMPLATE
from edge.errors import InputError


@dataclass(frozen=True)
class Source:
    """A transformers folder to export. config: its config.json. template: its chat template, "" without one.

    record: its manifest, or one made up from its files. weights: bytes of its safetensors files.
    """

    path: Path
    record: manifest.Manifest
    config: dict[str, Any]
    template: str
    weights: int

    @property
    def file_name(self) -> str:
        """The model's name as the beginning of a file's."""
        return safe_name(self.record.name)

    @property
    def whole(self) -> str:
        """The GGUF type that keeps the precision of the weights."""
        dtype = str(self.config.get("dtype") or self.config.get("torch_dtype") or "")
        return {"bfloat16": "BF16", "float32": "F32"}.get(dtype, "F16")

    def write_manifest(
        self,
        folder: Path,
        stage: str,
        settings: dict[str, Any],
        packages: tuple[str, ...],
        verify: dict[str, Any],
    ) -> None:
        """Write the manifest of `folder`, a `stage` that was made from this one."""
        record = self.record.child(stage, self.path, settings=settings, packages=packages)
        record.chat_template, record.verify = manifest.text_digest(self.template or None), verify
        manifest.write(folder, record)


def safe_name(name: str) -> str:
    """A model's name without the characters that a file's name cannot have."""
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]+', "-", name).strip(" .-") or "model"


def open_source(path: Path) -> Source:
    """The folder to export, checked. Raises InputError where something is missing or was changed.

    A folder without edge.json was made elsewhere: its own files say where a turn ends.
    """
    elsewhere = (path / "config.json").is_file() and not (path / manifest.FILE).is_file()
    record = None if elsewhere else manifest.read(path)
    folder = check_folder(path.resolve())
    if record is None:
        form = chat_format.load(folder.path, plain=True)
        template = form.source
        record = manifest.Manifest(
            "model", folder.path.name, chat_template=form.digest, stop_ids=form.stop_ids
        )
    else:
        template = read_template(folder.path, record)
    weights = sum(file.stat().st_size for file in folder.weights)
    return Source(folder.path, record, folder.config, template, weights)


def read_template(source: Path, origin: manifest.Manifest) -> str:
    """The chat template of the folder `source`, exactly; "" where the manifest `origin` names none either.

    Raises InputError where it is missing, because the exported model would answer gibberish, and where it is
    not the one that `origin` names.
    """
    path = source / TEMPLATE
    if not path.is_file():
        if origin.chat_template is None:
            return ""
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
