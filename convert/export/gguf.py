"""Merged model -> GGUF: llama.cpp's own converter, then its quantiser, then proof that nothing was lost.

    RUN/merged/ -> RUN/gguf/<name>-<QUANT>.gguf

The converter comes out of the pinned sdist with its matching gguf-py and runs in a process of its own; so
does the quantiser, because native code may abort. Before the folder is published the file is compared with
the merged model: chat template byte for byte, vocabulary, end tokens, and the token ids of probe texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tokenizers import Tokenizer

from convert.export import gguf_split
from convert.export.llamacpp_tools import GPTQ, NEED_MATRIX, QUANTS, WHOLE, quantize, run_child, run_converter
from convert.export.source import TEMPLATE, Source, folders, open_source
from convert.model.hf_folder import SMALL, parameters
from convert.verify import compare as verify
from convert.verify import probes
from convert.verify.gguf_reader import GgufReader
from convert.verify.logits import Reference
from convert.verify.probes import TEXTS as PROBES
from convert.verify.torch_reader import TorchReader
from edge.artefact import manifest
from edge.artefact.gguf_header import GGUFHeader, read_header
from edge.errors import InputError, UsageError

if TYPE_CHECKING:
    from convert.export.imatrix import Matrix

DEFAULT, DEFAULT_SMALL = "Q4_K_M", "Q8_0"


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
    """Export `run_folder/merged`, or a transformers folder itself, to its `gguf` folder.

    quant: one of QUANTS; None takes Q8_0 for small models, Q4_K_M for others and with `imatrix` or `gptq`.
    Returns the path of the GGUF file. Raises UsageError for an unknown quant, InputError for a run without a
    usable merged model or an artefact that differs from it, ExistsError without `overwrite`.
    """
    source, target = folders(run_folder)
    return export(
        source,
        target,
        quant=quant,
        imatrix=imatrix,
        gptq=gptq,
        split=split,
        overwrite=overwrite,
        console=console,
    )


def export(
    source: Path,
    target: Path,
    *,
    quant: str | None = None,
    imatrix: bool = False,
    gptq: bool = False,
    split: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Export the transformers folder `source` to the folder `target`; as `run`.

    imatrix, gptq: quantise with and without an importance matrix, or with codes that convert.export.gptq chose, and
    keep what is closer to the source. split: bytes of tensors of one file at most, 0 for a single file. What
    was converted before an export broke off is taken by the next one of the same weights.
    """
    console = console or Console(markup=False, highlight=False, soft_wrap=True)
    quant = check_quant(quant) if quant else None
    origin = open_source(source)
    small = parameters(origin.weights, origin.config) < SMALL
    # Both are for what four bits lose.
    quant = quant or (DEFAULT_SMALL if small and not (imatrix or gptq) else DEFAULT)
    target = target.absolute()
    manifest.check_target(target, overwrite)
    if imatrix and quant in WHOLE:
        raise UsageError(f"--imatrix: {quant} is not quantised", "leave it out, or choose a smaller type")
    if gptq and quant not in GPTQ:
        raise UsageError(f"--gptq cannot choose the codes of {quant}", f"types: {' '.join(GPTQ)}")
    if gptq and imatrix:
        raise UsageError(
            "--gptq and --imatrix are two ways to round", "leave one out; --ladder measures both"
        )
    with manifest.publish(target, overwrite=overwrite) as partial:
        final = partial / f"{origin.file_name}-{quant}.gguf"
        settings: dict[str, Any] = {}
        check_space(origin, target, quant)
        with console.status(f"converting {origin.path} with llama.cpp's converter"):
            if quant in WHOLE:
                first = final
                convert(origin, final, quant)
            else:
                first = converted(origin, target, console)
        fallbacks: list[str] = []
        if first is not final:
            matrix = None
            if imatrix or quant in NEED_MATRIX:
                with console.status("gathering the importance matrix"):
                    matrix = gather(origin, first, partial / "imatrix.npz")
                settings["imatrix"] = {"tokens": matrix.tokens, "from": matrix.source}
            with console.status(f"quantising to {quant}"):
                fallbacks = quantize(first, final, quant, matrix and partial / "imatrix.npz")
                plain = partial / "plain.gguf"
                if matrix and quant not in NEED_MATRIX:
                    quantize(first, plain, quant)
            if gptq:
                shutil.copyfile(final, plain)
                settings["gptq"] = choose_codes(origin, first, final, console)
            shutil.rmtree(_kept(target))
            if plain.exists():
                way, title = ("gptq", "GPTQ") if gptq else ("imatrix", "importance matrix")
                settings[way] |= _choose(origin, final, plain, title, console)
            (partial / "imatrix.npz").unlink(missing_ok=True)
        with console.status("comparing with the merged model"):
            header = read_header(final)
            found = check(header, origin)
        if split:
            final = gguf_split.split(final, split)
        types = dict(Counter(tensor.type for tensor in header.tensors.values()).most_common())
        made = origin.manifest(quant, final, types=types, fallbacks=len(fallbacks), **settings)
        made.stop_ids = made.stop_ids or found["ends"]
        made.verify = found
        manifest.write(partial, made)
        report = compare(origin, final, console)
    result = target / final.name
    size = sum(one.bytes for one in header.tensors.values())
    console.print(f"{result}: {quant}, {size / 2**20:.0f} MiB ({origin.weights / size:.1f} times smaller)")
    console.print("  " + ", ".join(f"{count} x {kind}" for kind, count in types.items()))
    if fallbacks:
        console.print(
            f"  {len(fallbacks)} of {len(header.tensors)} tensors have rows that {quant} cannot hold "
            f"and took a larger type: {fallbacks[0]}"
        )
    verify.summary(report, console)
    return result


def check_quant(quant: str) -> str:
    """`quant` in capitals. Raises UsageError for a type that is not known."""
    if quant.upper() not in QUANTS:
        raise UsageError(f"--quant {quant}: no such type", f"types: {' '.join(QUANTS)}")
    return quant.upper()


def check_space(origin: Source, target: Path, quant: str) -> None:
    """Raise InputError unless the disk holds the first file and what is quantised from it."""
    wide = 2 if quant == "F32" and origin.whole != "F32" else 1
    manifest.check_free(target.parent, int(origin.weights * (wide if quant in WHOLE else 1.7)))


def gather(origin: Source, first: Path, archive: Path) -> Matrix:
    """The importance matrix of the source, for the file `first`; kept in `archive`."""
    # Imported late: torch, and nobody who only converts needs it.
    from convert.export import imatrix

    matrix = imatrix.gather(origin.path, origin.known, read_header(first))
    matrix.save(archive)
    return matrix


def choose_codes(origin: Source, first: Path, file: Path, console: Console) -> dict[str, Any]:
    """Choose the codes of `file`, which was quantised from `first`, anew; for the manifest, what on."""
    # Imported late, as above.
    from convert.export import gptq

    with console.status("GPTQ") as status:
        found = gptq.run(
            origin.path,
            origin.known,
            first,
            file,
            lambda layer, of: status.update(f"GPTQ: layer {layer + 1} of {of}"),
        )
    return {"tokens": found.tokens, "from": found.source, "tensors": found.tensors}


def _choose(origin: Source, final: Path, plain: Path, way: str, console: Console) -> dict[str, Any]:
    """Leave the closer of two files at `final`, made by `way`; what each diverges by, for the manifest."""
    found = {}
    with console.status(f"measuring what {way} brings"), contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(TorchReader(origin.path)))
        readers = {}
        for name, path in (("with", final), ("without", plain)):
            readers[name] = stack.enter_context(contextlib.closing(GgufReader(path)))
            readers[name].thinking = origin.known.thinking
        reference = stack.enter_context(contextlib.closing(Reference(source, readers["with"])))
        for name, reader in readers.items():
            found[name] = reference.against(reader)["kl_mean"]
    factor = found["without"] / found["with"] if found["with"] else 1.0
    kept = "with" if factor >= 1 else "without"
    console.print(
        f"{way}: mean KL {found['with']:.2e} with it, {found['without']:.2e} without "
        f"({factor:.2f} times); the file {kept} it is kept"
    )
    if kept == "without":
        plain.replace(final)
    plain.unlink(missing_ok=True)
    return {"kl_with": found["with"], "kl_without": found["without"], "factor": factor, "kept": kept}


def compare(origin: Source, final: Path, console: Console) -> verify.Report:
    """Compare the file with its source; the report is kept beside it, a difference refuses it."""
    with (
        contextlib.closing(TorchReader(origin.path)) as a,
        contextlib.closing(GgufReader(final)) as b,
    ):
        report = verify.compare(a, b, console=console)
    report.refuse()
    verify.keep(report)
    return report


def convert(origin: Source, target: Path, quant: str) -> None:
    """Write the source as the unquantised GGUF `target` of the type `quant`, one of WHOLE."""
    options = ["--outtype", WHOLE[quant], "--model-name", origin.known.name]
    run_converter("convert_hf_to_gguf.py", origin.path, target, options)


def converted(origin: Source, target: Path, console: Console) -> Path:
    """The unquantised GGUF that an export to `target` starts from: made, or left by one that broke off."""
    states = [(one.name, one.stat()) for one in sorted(origin.path.iterdir())]
    seen = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    key = hashlib.sha256(repr((seen, origin.template)).encode()).hexdigest()[:16]
    folder = _kept(target)
    path = folder / f"{origin.whole}-{key}.gguf"
    if path.is_file():
        console.print(f"going on from what an earlier export had converted: {path}")
        return path
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    part = path.with_suffix(".part")
    try:
        convert(origin, part, origin.whole)
    except BaseException:
        shutil.rmtree(folder)
        raise
    part.replace(path)
    return path


def _kept(target: Path) -> Path:
    return target.with_name(f".{target.name}-first")


def check(header: GGUFHeader, origin: Source) -> dict[str, Any]:
    """What of a file must be as in the folder it was made from. Raises InputError that names the difference.

    Returns what was compared; `ends` are the tokens at which llama.cpp itself would stop.
    """
    path, source, config, stop_ids = header.path, origin.path, origin.config, origin.known.stop_ids
    again = "the file was not published; this model needs a tokenizer or converter that agree"
    if header.chat_template != origin.template:
        raise InputError(f"{path.name}: the chat template differs from {source / TEMPLATE}", again)
    text_config = config.get("text_config") or config
    tied = bool(config.get("tie_word_embeddings", text_config.get("tie_word_embeddings", False)))
    if ("output.weight" in header.tensors) == tied:
        state = "has" if tied else "lacks"
        raise InputError(
            f"{path.name} {state} output.weight, config.json says tie_word_embeddings={tied}", again
        )
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    added = [str(token) for token in tokenizer.get_added_tokens_decoder().values()]
    prompts = [*PROBES, *probes.special_texts(added), origin.template]
    answer, _ = run_child("inspect", {"path": str(path), "prompts": prompts}, path)
    vocab = int(text_config.get("vocab_size", 0))
    if not answer["vocab_size"] == header.vocab_size == vocab:
        raise InputError(f"{path.name} has {answer['vocab_size']} tokens, config.json says {vocab}", again)
    # Without the tokens that a tokenizer may add around a text: the chat template writes those.
    for prompt, ids in zip(prompts, answer["ids"], strict=True):
        expected = tokenizer.encode(prompt, add_special_tokens=False).ids
        if ids != expected:
            raise InputError(
                f"{path.name}: the prompt {prompt[:60]!r} has the token ids {ids[:12]} in llama.cpp, "
                f"{expected[:12]} in the tokenizer",
                again,
            )
    if stop_ids and answer["eos"] not in stop_ids:
        raise InputError(
            f"{path.name} ends with token {answer['eos']}, the merged model with {stop_ids}", again
        )
    return {
        "chat_template": "equal",
        "vocab_size": vocab,
        "tied": tied,
        "probe_texts": len(prompts),
        "token_ids": "equal",
        "ends": answer["ends"],
    }
