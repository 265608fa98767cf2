"""Merged model -> GGUF: llama.cpp's own converter, then its quantiser, then proof that nothing was lost.

    RUN/merged/ -> RUN/gguf/<name>-<QUANT>.gguf

Before the folder is published the file is compared with the merged model: chat template byte for byte,
vocabulary, stop tokens, the token ids of probe texts, and logits.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from convert.export import gguf_split
from convert.export.gptq import choose_codes
from convert.export.imatrix import gather
from convert.export.llamacpp_tools import (
    DEFAULT,
    DEFAULT_SMALL,
    NEED_MATRIX,
    WHOLE,
    check_quantisation,
    quantize,
    run_converter,
)
from convert.export.source import Source, open_source
from convert.model.hf_folder import SMALL, parameters, stage_folder
from convert.verify import compare
from convert.verify.gguf_reader import GgufReader
from convert.verify.logits import Reference
from convert.verify.torch_reader import TorchReader
from edge.artefact import manifest
from edge.artefact.find import TEMPLATE
from edge.artefact.gguf_header import GGUFHeader, read_header
from edge.console import plain_console
from edge.errors import InputError
from edge.progress import phase

_PACKAGES = ("llama-cpp-python", "torch", "transformers", "tokenizers")
_PLAIN = "plain.gguf"  # rounded to the nearest, to compare with


def run(
    run_folder: Path,
    *,
    quant: str | None = None,
    imatrix: bool = False,
    gptq: bool = False,
    split: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Export `run_folder/merged`, or a transformers folder itself, to its `gguf` folder; the file's path.

    quant: one of llamacpp_tools.QUANTS; None takes Q8_0 for small models, Q4_K_M for others and with
    `imatrix` or `gptq`. These quantise with and without an importance matrix, or with codes that
    convert.export.gptq chose, and keep the file that is closer to the source. split: bytes of tensors of one
    file at most, 0 for a single file. Raises UsageError for options that do not go together, InputError for a
    run without a usable merged model or a file that differs from it, ExistsError without `overwrite`.
    """
    console = console or plain_console()
    quant = check_quantisation(quant, imatrix, gptq)
    origin = open_source(stage_folder(run_folder, "merged"))
    small = parameters(origin.weights, origin.config) < SMALL
    # An importance matrix and GPTQ make up for what four bits lose.
    quant = quant or (DEFAULT_SMALL if small and not (imatrix or gptq) else DEFAULT)
    rounding = "gptq" if gptq else "imatrix" if imatrix or quant in NEED_MATRIX else ""
    target = run_folder.absolute() / "gguf"
    manifest.check_target(target, overwrite)
    widens = quant == "F32" and origin.whole != "F32"
    manifest.check_free(target.parent, int(origin.weights * (1.7 if quant not in WHOLE else 1 + widens)))
    with manifest.publish(target, overwrite=overwrite) as partial:
        file = partial / f"{origin.file_name}-{quant}.gguf"
        fallbacks: list[str] = []
        settings: dict[str, Any] = {}
        measured = None
        if quant in WHOLE:
            with phase(console, f"converting {origin.path}"):
                convert(origin, file, quant)
        else:
            with converted(origin, target, console) as first:
                fallbacks, settings = _quantise(origin, first, file, quant, rounding, console)
            if (partial / _PLAIN).exists():
                facts, measured = _keep_closer(origin, file, rounding, console)
                settings[rounding] |= facts
        header = read_header(file)
        settings["fallbacks"] = len(fallbacks)
        published, report = prove(origin, header, quant, settings, console, split=split, measured=measured)
    _show(target / published.name, header, origin, quant, fallbacks, console)
    compare.summary(report, console)
    return target / published.name


def _quantise(
    origin: Source, first: Path, file: Path, quant: str, rounding: str, console: Console
) -> tuple[list[str], dict[str, Any]]:
    """Quantise `first` to `file`, and to _PLAIN where its rounding is to be compared with the nearest.

    Returns a line for each tensor that took a larger type, and what the rounding was measured on.
    """
    plain, archive = file.with_name(_PLAIN), file.with_name("imatrix.safetensors")
    facts: dict[str, Any] = {}
    if rounding == "imatrix":
        with phase(console, "gathering the importance matrix"):
            facts = gather(origin, first, archive)
    with phase(console, f"quantising to {quant}"):
        fallbacks = quantize(first, file, quant, archive if facts else None)
        if rounding == "imatrix" and quant not in NEED_MATRIX:
            quantize(first, plain, quant)
    archive.unlink(missing_ok=True)
    if rounding == "gptq":
        shutil.copyfile(file, plain)
        facts = choose_codes(origin, first, file, console)
    return fallbacks, {rounding: facts} if rounding else {}


def reference_by(origin: Source, file: Path) -> Reference:
    """The merged model's logits, for texts that the GGUF `file` writes, which is faster; to be closed."""
    with contextlib.closing(GgufReader(file)) as writer:
        return Reference(TorchReader(origin.path), writer)


def _keep_closer(
    origin: Source, file: Path, rounding: str, console: Console
) -> tuple[dict[str, Any], compare.Measured | None]:
    """Leave the closer to the source of `file` and _PLAIN at `file`.

    Returns their divergences, for the manifest; and what was measured of `file`, where it stays.
    """
    name = {"gptq": "GPTQ", "imatrix": "importance matrix"}[rounding]
    plain = file.with_name(_PLAIN)
    found = {}
    with (
        phase(console, f"measuring what {name} brings"),
        contextlib.closing(reference_by(origin, file)) as reference,
    ):
        for key, path in (("with", file), ("without", plain)):
            with contextlib.closing(GgufReader(path)) as reader:
                found[key] = compare.Measured(reference.against(reader), reference.notes)
    kl = {key: measured.logits["kl_mean"] for key, measured in found.items()}
    factor = kl["without"] / kl["with"] if kl["with"] else 1.0
    kept = "with" if factor >= 1 else "without"
    console.print(
        f"{name}: mean KL {kl['with']:.2e} with it, {kl['without']:.2e} without "
        f"({factor:.2f} times); the file {kept} it is kept"
    )
    if kept == "without":
        plain.replace(file)
    plain.unlink(missing_ok=True)
    facts = {"kl_with": kl["with"], "kl_without": kl["without"], "factor": factor, "kept": kept}
    return facts, found["with"] if kept == "with" else None


def _show(
    path: Path, header: GGUFHeader, origin: Source, quant: str, fallbacks: list[str], console: Console
) -> None:
    size = header.weights_bytes
    console.print(f"{path}: {quant}, {size / 2**20:.0f} MiB ({origin.weights / size:.1f} times smaller)")
    console.print("  " + ", ".join(f"{count} x {kind}" for kind, count in _types(header).items()))
    if fallbacks:
        console.print(
            f"  {len(fallbacks)} of {len(header.tensors)} tensors have rows that {quant} cannot hold "
            f"and took a larger type: {fallbacks[0]}"
        )


def _types(header: GGUFHeader) -> dict[str, int]:
    """How many tensors have which type, the most frequent first."""
    return dict(Counter(tensor.type for tensor in header.tensors.values()).most_common())


def prove(
    origin: Source,
    header: GGUFHeader,
    quant: str,
    settings: dict[str, Any],
    console: Console,
    *,
    split: int = 0,
    measured: compare.Measured | None = None,
) -> tuple[Path, compare.Report]:
    """Check the file of `header`, write its folder's manifest and compare it with its source; (path, report).

    settings: what the manifest is to say of the export. split: as in `run`; the path is the first part's.
    measured: of the whole file, where that is known.
    Raises InputError where the file may not stand for its source.
    """
    facts = check(header, origin)
    path = gguf_split.split(header.path, split) if split else header.path
    settings = {"quant": quant, "file": path.name, "types": _types(header), **settings}
    origin.write_manifest(path.parent, "gguf", settings, _PACKAGES, facts)
    known = None if split else measured
    return path, compare.prove(TorchReader(origin.path), GgufReader(path), console, measured=known)


def convert(origin: Source, target: Path, quant: str) -> None:
    """Write the source as the unquantised GGUF `target` of the type `quant`, one of WHOLE."""
    options = ["--outtype", WHOLE[quant], "--model-name", origin.record.name]
    run_converter("convert_hf_to_gguf.py", origin.path, target, options)


@contextlib.contextmanager
def converted(origin: Source, target: Path, console: Console) -> Iterator[Path]:
    """The source as an unquantised GGUF beside `target`, converted or left by an export that broke off.

    It is removed when the block ends well, and left to the next export of the same weights when it does not.
    """
    states = [(path.name, path.stat()) for path in sorted(origin.path.iterdir())]
    stamps = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    key = hashlib.sha256(repr((stamps, origin.template)).encode()).hexdigest()[:16]
    folder = target.with_name(f".{target.name}-first")
    path = folder / f"{origin.whole}-{key}.gguf"
    if path.is_file():
        console.print(f"going on from what an earlier export had converted: {path}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        part = path.with_suffix(".part")
        try:
            with phase(console, f"converting {origin.path}"):
                convert(origin, part, origin.whole)
        except BaseException:
            shutil.rmtree(folder)
            raise
        part.replace(path)
    yield path
    shutil.rmtree(folder)


def check(header: GGUFHeader, origin: Source) -> dict[str, Any]:
    """Compare what a file says of itself with its source; what was compared, for the manifest.

    Token ids and logits are left to the comparison. Raises InputError that names the difference.
    """
    config, stop_ids = origin.config, origin.record.stop_ids
    text_config = config.get("text_config") or config
    tied = bool(config.get("tie_word_embeddings", text_config.get("tie_word_embeddings", False)))
    vocab = int(text_config.get("vocab_size", 0))
    end = header.metadata.get("tokenizer.ggml.eos_token_id")
    if (header.chat_template or "") != origin.template:
        problem = f"the chat template differs from {origin.path / TEMPLATE}"
    elif ("output.weight" in header.tensors) == tied:
        state = "has" if tied else "lacks"
        problem = f"it {state} output.weight, config.json says tie_word_embeddings={tied}"
    elif header.vocab_size != vocab:
        problem = f"it has {header.vocab_size} tokens, config.json says {vocab}"
    elif stop_ids and end is not None and end not in stop_ids:
        problem = f"it ends with token {end}, the merged model with {stop_ids}"
    else:
        return {"vocab_size": vocab, "tied": tied}
    raise InputError(
        f"{header.path.name}: {problem}",
        "the file was not published; this model needs a tokenizer or converter that agree",
    )
