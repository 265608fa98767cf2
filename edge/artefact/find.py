"""Finds the GGUF and ONNX files behind a run, a folder or a file, and what is known of them."""

from __future__ import annotations

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
    """A model file to serve. digest: of the folder it was published in, or of nothing known ("").

    kind: the backend that serves it. lora: an adapter that goes on top of it; llama.cpp puts one on a whole
    context, so on every request.
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
            files = [file for file in sorted(folder.glob(f"*.{SUFFIXES[kind]}")) if not is_later(file)]
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


def check_lora(path: Path, base: GGUFHeader | None = None) -> GGUFHeader:
    """The header of a LoRA adapter in GGUF, checked before native code sees it.

    base: the model that it is to go on top of. Raises InputError for another kind of file, fields of a wrong
    type (llama.cpp would end the process over those), halves that do not pair, or a model that does not fit.
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
            there = base.tensors.get(layer)
            if there is None or there.shape != (two["a"][0], two["b"][1]):
                shape = "none" if there is None else "x".join(map(str, there.shape))
                raise InputError(
                    f"{path} changes {layer} of {two['a'][0]}x{two['b'][1]}, {base.path} has {shape}",
                    "give the model that the adapter was trained on",
                )
    return header


def with_lora(found: Artefact, lora: Path) -> Artefact:
    """`found` with the adapter `lora` on top: a .gguf file, a run, or its folder of that.

    Raises InputError as `check_lora`, and where the adapter was trained with another chat template.
    """
    if lora.is_dir():
        files = sorted([*lora.glob("*.gguf"), *(lora / "lora").glob("*.gguf")])
        if len(files) != 1:
            raise InputError(f"{lora} holds {len(files)} adapters as GGUF", "make one: edge export lora RUN")
        lora = files[0]
    if not isinstance(found.header, GGUFHeader):
        raise InputError(f"{found.path} is no GGUF: an adapter goes on top of one", "edge export gguf RUN")
    check_lora(lora, found.header)
    folder = lora.parent
    known = manifest.read(folder) if (folder / manifest.FILE).is_file() else None
    if known is None or lora.name not in known.files:
        return replace(found, name=lora.stem, lora=lora.absolute())
    if known.chat_template not in (None, manifest.text_digest(found.chat_template)):
        raise InputError(
            f"{lora} was trained with another chat template than {found.path} has",
            "serve it on the model that it was trained on",
        )
    return replace(
        found,
        name=known.name,
        lora=lora.absolute(),
        digest=f"{found.digest}+{known.digest}",
        stop_ids=found.stop_ids | frozenset(known.stop_ids),
        thinking=known.thinking,
    )


def read_template(folder: Path) -> str | None:
    """The chat template beside an ONNX model."""
    path = folder / TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _manifest(folder: Path) -> manifest.Manifest | None:
    return manifest.read(folder) if (folder / manifest.FILE).is_file() else None


def _artefact(path: Path, kind: str, known: manifest.Manifest | None) -> Artefact:
    header: GGUFHeader | OnnxHeader
    if kind == "onnx":
        header = read_onnx(path)
        template = read_template(path.parent)
    else:
        header = read_whole(path)
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
