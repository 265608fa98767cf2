"""Finds the GGUF and ONNX files behind a run, a folder or a file, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge import manifest
from edge.errors import InputError
from edge.gguf_header import GGUFHeader, read_header
from edge.onnx_header import OnnxHeader, read_onnx

TEMPLATE = "chat_template.jinja"
# Backend -> how the files that it serves end, which is also the name of their folder in a run.
SUFFIXES = {"llamacpp": "gguf", "onnx": "onnx"}


@dataclass(frozen=True, slots=True)
class Artefact:
    """A model file to serve. digest: of the folder it was published in, or of nothing known ("").

    kind: the backend that serves it.
    """

    path: Path
    name: str
    header: GGUFHeader | OnnxHeader
    digest: str = ""
    stop_ids: frozenset[int] = frozenset()
    thinking: str | None = None
    chat_template: str | None = None
    kind: str = "llamacpp"


def resolve(given: Path, kind: str | None = None) -> Artefact:
    """The artefact behind a run folder, a stage's folder or a file; GGUF before ONNX, or that of `kind`.

    Raises InputError where nothing can be served, naming what was looked for, or where a header is broken.
    """
    found = candidates(given, (kind,) if kind is not None else tuple(SUFFIXES))
    return found[0]


def candidates(given: Path, kinds: tuple[str, ...] = tuple(SUFFIXES)) -> list[Artefact]:
    """Every artefact of `kinds` behind `given`, at least one. Raises as `resolve`."""
    if given.is_file():
        kind = next((one for one in kinds if given.suffix.lower() == f".{SUFFIXES[one]}"), None)
        if kind is None:
            names = " or ".join(f".{SUFFIXES[one]}" for one in kinds)
            raise InputError(f"{given} is not a {names} file", "give such a file, or a folder that edge made")
        known = _manifest(given.parent)
        return [_artefact(given, kind, known if known is not None and given.name in known.files else None)]
    if not given.is_dir():
        raise InputError(
            f"no such file or folder: {given}", "give a run, a folder with a model, or a .gguf or .onnx file"
        )
    found = []
    for kind in kinds:
        for folder in (given / SUFFIXES[kind], given):
            files = sorted(folder.glob(f"*.{SUFFIXES[kind]}"))
            if len(files) > 1:
                names = ", ".join(file.name for file in files)
                raise InputError(
                    f"{folder} holds several {SUFFIXES[kind].upper()} files: {names}",
                    "give one of them by its path",
                )
            if files:
                found.append(_artefact(files[0], kind, _manifest(folder)))
                break
    if found:
        return found
    format = SUFFIXES[kinds[0]]
    if (given / "merged").is_dir():
        raise InputError(
            f"{given} has a merged model but no {format.upper()} yet", f"edge export {format} {given}"
        )
    if (given / "adapter").is_dir():
        raise InputError(
            f"{given} has an adapter but no {format.upper()} yet",
            f"edge merge {given}, then edge export {format} {given}",
        )
    raise InputError(
        f"{given} holds no {' or '.join(SUFFIXES[one].upper() for one in kinds)} file",
        f"run `edge export {format}`, or give another folder",
    )


def _manifest(folder: Path) -> manifest.Manifest | None:
    return manifest.read(folder) if (folder / manifest.FILE).is_file() else None


def _artefact(path: Path, kind: str, known: manifest.Manifest | None) -> Artefact:
    header: GGUFHeader | OnnxHeader
    if kind == "onnx":
        header = read_onnx(path)
        file = path.parent / TEMPLATE
        template = file.read_text(encoding="utf-8") if file.is_file() else None
    else:
        header = read_header(path)
        template = header.chat_template
    if known is None:
        return Artefact(path.absolute(), path.stem, header, chat_template=template, kind=kind)
    if known.chat_template is not None and known.chat_template != manifest.text_digest(template):
        raise InputError(
            f"{path}: its chat template is not the one that {manifest.FILE} names",
            "the file was changed after its export; export it again",
        )
    for name in header.files if isinstance(header, OnnxHeader) else ():
        size = (path.parent / name).stat().st_size
        told = known.files.get(name, {}).get("size", size)
        if size != told:
            raise InputError(
                f"{path.parent / name} has {size:,} bytes, {manifest.FILE} says {told:,}",
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
        kind=kind,
    )
