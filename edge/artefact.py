"""Finds the GGUF file behind a run, a folder or a file, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge import manifest
from edge.errors import InputError
from edge.gguf_header import GGUFHeader, read_header


@dataclass(frozen=True, slots=True)
class Artefact:
    """A model file to serve. digest: of the folder it was published in, or of nothing known ("")."""

    path: Path
    name: str
    header: GGUFHeader
    digest: str = ""
    stop_ids: frozenset[int] = frozenset()
    thinking: str | None = None
    chat_template: str | None = None


def resolve(given: Path) -> Artefact:
    """The artefact behind a run folder, a stage's folder or a .gguf file.

    Raises InputError where nothing can be served, naming what was looked for, or where a header is broken.
    """
    if given.is_file():
        if given.suffix.lower() != ".gguf":
            raise InputError(f"{given} is not a GGUF file", "give a .gguf file, or a folder that edge made")
        folder = given.parent
        known = manifest.read(folder) if (folder / manifest.FILE).is_file() else None
        if known is not None and given.name not in known.files:
            known = None
        return _artefact(given, known)
    if not given.is_dir():
        raise InputError(
            f"no such file or folder: {given}", "give a run, a folder with a GGUF, or a .gguf file"
        )
    for folder in (given / "gguf", given):
        files = sorted(folder.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise InputError(f"{folder} holds several GGUF files: {names}", "give one of them by its path")
        if files:
            known = manifest.read(folder) if (folder / manifest.FILE).is_file() else None
            return _artefact(files[0], known)
    if (given / "merged").is_dir():
        raise InputError(f"{given} has a merged model but no GGUF yet", f"edge export gguf {given}")
    if (given / "adapter").is_dir():
        raise InputError(
            f"{given} has an adapter but no GGUF yet", f"edge merge {given}, then edge export gguf"
        )
    raise InputError(f"{given} holds no GGUF file", "run `edge export gguf`, or give another folder")


def _artefact(path: Path, known: manifest.Manifest | None) -> Artefact:
    header = read_header(path)
    if known is None:
        return Artefact(path.absolute(), path.stem, header, chat_template=header.chat_template)
    template = header.chat_template
    if known.chat_template is not None and known.chat_template != manifest.text_digest(template):
        raise InputError(
            f"{path}: its chat template is not the one that {manifest.FILE} names",
            "the file was changed after its export; export it again",
        )
    return Artefact(
        path=path.absolute(),
        name=known.name,
        header=header,
        digest=known.digest,
        stop_ids=frozenset(known.stop_ids),
        thinking=known.thinking,
        chat_template=template,
    )
