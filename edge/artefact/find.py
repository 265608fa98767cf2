"""Finds the GGUF and ONNX files behind a run, a folder or a file, and reads their headers and manifests."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from edge.artefact import manifest
from edge.artefact.gguf_header import GGUFHeader, read_header
from edge.artefact.gguf_shards import is_later, read_whole
from edge.artefact.onnx_header import OnnxHeader, read_onnx
from edge.errors import InputError

TEMPLATE = "chat_template.jinja"
# Backend -> how the files that it serves end, which is also the name of their folder in a run.
SUFFIXES = {"llamacpp": "gguf", "onnx": "onnx"}


@dataclass(frozen=True, slots=True)
class Artefact:
    """A model file to serve. digest: of the folder that it was published in; "" without a manifest.

    kind: the backend that serves it. lora: an adapter that is applied to it; llama.cpp applies one to a whole
    context, so to every request. made_from: the digest of the folder that was exported, created: when;
    both "" without a manifest.
    """

    path: Path
    name: str
    header: GGUFHeader | OnnxHeader
    digest: str = ""
    stop_ids: frozenset[int] = frozenset()
    thinking: str | None = None
    chat_template: str | None = None
    lora: Path | None = None
    kind: str = "llamacpp"
    made_from: str = ""
    created: str = ""


def resolve(given: Path, kind: str | None = None) -> Artefact:
    """The artefact behind a run folder, a stage's folder or a file; GGUF before ONNX, or that of `kind`.

    Raises InputError where nothing can be served, naming what was looked for, or where a header is broken.
    """
    return candidates(given, (kind,) if kind is not None else tuple(SUFFIXES))[0]


def candidates(given: Path, kinds: tuple[str, ...] = tuple(SUFFIXES)) -> list[Artefact]:
    """Every artefact of `kinds` behind `given`, at least one. Raises as `resolve`."""
    if given.is_file():
        matching = [kind for kind in kinds if given.suffix.lower() == f".{SUFFIXES[kind]}"]
        if not matching:
            names = " or ".join(f".{SUFFIXES[kind]}" for kind in kinds)
            raise InputError(f"{given} is not a {names} file", "give such a file, or a folder that edge made")
        return [_artefact(given, matching[0])]
    if not given.is_dir():
        raise InputError(
            f"no such file or folder: {given}", "give a run, a folder with a model, or a .gguf or .onnx file"
        )
    artefacts = []
    for kind in kinds:
        for folder in (given / SUFFIXES[kind], given):
            files = [file for file in sorted(folder.glob(f"*.{SUFFIXES[kind]}")) if not is_later(file)]
            if len(files) > 1:
                names = ", ".join(file.name for file in files)
                raise InputError(
                    f"{folder} holds several {SUFFIXES[kind].upper()} files: {names}",
                    "give one of them by its path",
                )
            if files:
                artefacts.append(_artefact(files[0], kind))
                break
    if artefacts:
        return artefacts
    format = SUFFIXES[kinds[0]]
    if (given / "adapter_config.json").is_file() and not (given / "merged").is_dir():
        raise InputError(
            f"{given} is an adapter, which needs the model that it was trained on",
            f"edge merge {given} (--base MODEL where that one has moved), then edge export {format} {given}",
        )
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
        f"{given} holds no {' or '.join(SUFFIXES[kind].upper() for kind in kinds)} file",
        f"run `edge export {format}`, or give another folder",
    )


def models_state(given: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of what `candidates` reads; equal where there is nothing new to read."""
    folders = [*(given / suffix for suffix in SUFFIXES.values()), given]
    holding = [f for f in folders if any([*f.glob(f"*.{suffix}")] for suffix in SUFFIXES.values())]
    state = []
    for path in sorted(
        {given, *given.glob("*/"), *(file for folder in holding for file in folder.glob("*"))}
    ):
        # What is replaced at this moment is there at the next look.
        with contextlib.suppress(OSError):
            stat = path.stat()
            state.append((str(path), *((0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns))))
    return state


def check_lora(path: Path, base: GGUFHeader | None = None) -> GGUFHeader:
    """The header of a LoRA adapter in GGUF, checked before native code sees it.

    base: the model that it is for. Raises InputError for another kind of file, fields of a wrong type (over
    which llama.cpp would end the process), halves that do not pair, or a model that does not fit.
    """
    header = read_header(path)
    if (header.metadata.get("general.type"), header.metadata.get("adapter.type")) != ("adapter", "lora"):
        raise InputError(f"{path} is no LoRA adapter", "make one: edge export lora RUN")
    if not isinstance(header.metadata.get("adapter.lora.alpha", 0.0), float):
        raise InputError(f"{path}: adapter.lora.alpha is no number of the right type", "export it again")
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in header.tensors.items():
        layer, dot, half = name.rpartition(".lora_")
        if not dot or half not in ("a", "b") or len(tensor.shape) != 2:
            raise InputError(f"{path}: {name} is no half of a low-rank update", "merge the adapter instead")
        pairs.setdefault(layer, {})[half] = tensor.shape
    for layer, two in pairs.items():
        if set(two) != {"a", "b"} or two["a"][1] != two["b"][0]:
            raise InputError(f"{path}: the two halves of {layer} do not fit", "export it again")
    if not pairs:
        raise InputError(f"{path} changes nothing: it has no tensors", "export it again")
    if base is not None:
        if header.architecture != base.architecture:
            raise InputError(
                f"{path} is for {header.architecture}, {base.path} is {base.architecture}",
                "give the model that the adapter was trained on",
            )
        for layer, two in pairs.items():
            changed = base.tensors.get(layer)
            if changed is None or changed.shape != (two["a"][0], two["b"][1]):
                shape = "none" if changed is None else "x".join(map(str, changed.shape))
                raise InputError(
                    f"{path} changes {layer} of {two['a'][0]}x{two['b'][1]}, {base.path} has {shape}",
                    "give the model that the adapter was trained on",
                )
    return header


def with_lora(artefact: Artefact, lora: Path) -> Artefact:
    """`artefact` with an adapter. lora: a .gguf file, a run, or a run's folder with one.

    Raises InputError as `check_lora`, and where the adapter was trained with another chat template.
    """
    if lora.is_dir():
        files = sorted([*lora.glob("*.gguf"), *(lora / "lora").glob("*.gguf")])
        if len(files) != 1:
            raise InputError(
                f"{lora} holds {len(files)} adapters as GGUF, one is needed", "make one: edge export lora RUN"
            )
        lora = files[0]
    if not isinstance(artefact.header, GGUFHeader):
        raise InputError(f"{artefact.path} is no GGUF: an adapter is applied to one", "edge export gguf RUN")
    check_lora(lora, artefact.header)
    record = published(lora)
    if record is None:
        return replace(artefact, name=lora.stem, lora=lora.absolute())
    if record.chat_template not in (None, manifest.text_digest(artefact.chat_template)):
        raise InputError(
            f"{lora} was trained with another chat template than {artefact.path} has",
            "serve it on the model that it was trained on",
        )
    return replace(
        artefact,
        name=record.name,
        lora=lora.absolute(),
        digest=f"{artefact.digest}+{record.digest}",
        stop_ids=artefact.stop_ids | frozenset(record.stop_ids),
        thinking=record.thinking,
    )


def read_template(folder: Path) -> str | None:
    """The chat template beside an ONNX model. Raises InputError where it is not UTF-8."""
    path = folder / TEMPLATE
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}", "export it again") from error


def published(file: Path) -> manifest.Manifest | None:
    """The manifest of the file's folder; None without one, or where it does not name the file."""
    if not (file.parent / manifest.FILE).is_file():
        return None
    record = manifest.read(file.parent)
    return record if file.name in record.files else None


def _artefact(path: Path, kind: str) -> Artefact:
    header = read_onnx(path) if kind == "onnx" else read_whole(path)
    template = header.chat_template if isinstance(header, GGUFHeader) else read_template(path.parent)
    record = published(path)
    if record is None:
        return Artefact(path.absolute(), path.stem, header, chat_template=template, kind=kind)
    if record.chat_template not in (None, manifest.text_digest(template)):
        raise InputError(
            f"{path}: its chat template is not the one that {manifest.FILE} names",
            "the file was changed after its export; export it again",
        )
    for name in header.files if isinstance(header, OnnxHeader) else ():
        size = (path.parent / name).stat().st_size
        exported = record.files.get(name, {}).get("size", size)
        if size != exported:
            raise InputError(
                f"{path.parent / name} has {size:,} bytes, {manifest.FILE} says {exported:,}",
                "the file was changed after its export; export it again",
            )
    return Artefact(
        path=path.absolute(),
        name=record.name,
        header=header,
        digest=record.digest,
        stop_ids=frozenset(record.stop_ids),
        thinking=record.thinking,
        chat_template=template,
        kind=kind,
        made_from=record.parents[0]["digest"] if record.parents else "",
        created=record.created,
    )
