"""Merged model -> GGUF: llama.cpp's own converter, then its quantiser, then proof that nothing was lost.

    RUN/merged/ -> RUN/gguf/<name>-<QUANT>.gguf

The converter comes out of the pinned sdist with its matching gguf-py and runs in a process of its own; so
does the quantiser, because native code may abort. Before the folder is published the file is compared with
the merged model: chat template byte for byte, vocabulary, end tokens, and the token ids of probe texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tokenizers import Tokenizer

from convert.export import gguf_split
from convert.model import chat_format
from convert.model.hf_folder import SMALL, check_folder, parameters
from convert.verify import compare as verify
from convert.verify import probes
from convert.verify.logits import Reference
from convert.verify.probes import TEXTS as PROBES
from convert.verify.readers import GgufReader, TorchReader
from edge.artefact import manifest
from edge.artefact.gguf_header import FILE_TYPES, GGUFHeader, read_header
from edge.errors import EdgeError, InputError, UnavailableError, UsageError
from edge.machine import hardware
from edge.machine.llamacpp_source import sdist

if TYPE_CHECKING:
    from convert.export.imatrix import Matrix

DEFAULT, DEFAULT_SMALL = "Q4_K_M", "Q8_0"
# All that the quantiser knows, best quality first within a size (MXFP4 is for mixtures of experts).
QUANTS = (
    "F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0",
    "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0", "MXFP4_MOE",
    "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS",
    "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "Q2_0", "TQ2_0", "TQ1_0",
    "IQ1_M", "IQ1_S", "Q1_0",
)  # fmt: skip
# Below three bits rounding is blind without one: the quantiser refuses.
NEED_MATRIX = ("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
# Those whose tensors are mostly of types that convert.export.gptq knows.
GPTQ = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")
WHOLE = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
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


def folders(given: Path) -> tuple[Path, Path]:
    """(what to export, where to) for a run or a transformers folder."""
    if (given / "config.json").is_file():
        return given, given / "gguf"
    if given.is_dir() and not (given / "merged").is_dir():
        raise InputError(f"{given} has no merged model", f"make it: edge merge {given}")
    return given / "merged", given / "gguf"


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
    text = kept if kept and not (path / TEMPLATE).is_file() else _template(path, known)
    config = _json(path / "config.json")
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{path} has no *.safetensors file", "merge again: edge merge RUN")
    return Source(path, known, config, text, weights)


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


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", "merge again: edge merge RUN") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object", "merge again: edge merge RUN")
    return data


def _template(source: Path, origin: manifest.Manifest) -> str:
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


def run_converter(script_name: str, source: Path, target: Path, options: list[str]) -> None:
    """Run one of llama.cpp's converters. Raises EdgeError that says what it could not do."""
    script = sdist() / "vendor" / "llama.cpp" / script_name
    command = [sys.executable, str(script), str(source), "--outfile", str(target), *options]
    env = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("NO_LOCAL_GGUF", None)
    done = subprocess.run(command, capture_output=True, env=env, cwd=target.parent, check=False)
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode == 0 and target.is_file():
        return
    if "BPE pre-tokenizer was not recognized" in log:
        raise InputError(
            f"llama.cpp does not know the pre-tokenizer of {source / 'tokenizer.json'}",
            "use the base model's own tokenizer files, unchanged: with a guess the tokens would be wrong",
        )
    if unknown := re.search(r"Model (\S+) is not supported", log):
        raise InputError(
            f"llama.cpp's converter does not know the architecture {unknown[1]}", "use another base"
        )
    if missing := re.search(r"No module named '([\w.]+)'", log):
        raise UnavailableError(
            f"llama.cpp's converter needs the package '{missing[1]}', which is not installed",
            "pip install -c constraints.txt -e '.[train]'",
        )
    raise EdgeError(f"llama.cpp's converter failed on {source}:\n{_tail(log)}", "its last lines are above")


def _tail(log: str, lines: int = 12) -> str:
    return "\n".join(line[:200] for line in log.replace("\r", "\n").strip().splitlines()[-lines:])


def _native(mode: str, job: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """Run llamacpp_child.py; its answer and log. Raises EdgeError where it dies or refuses."""
    script = str(Path(__file__).with_name("llamacpp_child.py"))
    job = job | {"threads": hardware.cpu_threads()}
    done = subprocess.run(
        [sys.executable, "-P", script, mode],
        input=json.dumps(job).encode("utf-8"),
        capture_output=True,
        env=os.environ | {"PYTHONUTF8": "1"},
        check=False,
    )
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode != 0:
        raise EdgeError(
            f"llama.cpp could not {mode} {path.name} (exit code {done.returncode}):\n{_tail(log)}",
            "if it is not installed or does not load: python -m edge.machine.build_llamacpp",
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer, log


def quantize(source: Path, target: Path, quant: str, matrix: Path | None = None) -> list[str]:
    """Quantise; returns a line for each tensor that took another type than the recipe's."""
    ftype = next(number for number, name in FILE_TYPES.items() if name == quant)
    job = {"source": str(source), "target": str(target), "ftype": ftype, "imatrix": str(matrix or "")}
    answer, log = _native("quantize", job, target)
    if answer["code"] != 0:
        raise EdgeError(f"llama.cpp could not quantise to {quant}:\n{_tail(log)}", "try another --quant")
    found = re.findall(r"ncols\s+(\d+) not divisible by\s+(\d+).*?-> falling back to\s+(\S+)", log)
    return [f"rows of {columns} are no multiple of {block}, so {kind}" for columns, block, kind in found]


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
    answer, _ = _native("inspect", {"path": str(path), "prompts": prompts}, path)
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
