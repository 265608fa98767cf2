"""Merged model -> ONNX: onnxruntime-genai's model builder, then proof of how near it came.

    RUN/merged/ -> RUN/onnx/<name>-<precision>.onnx, its weights beside it

The builder runs in a process of its own. Before the folder is published the file is read as the server reads
it, its vocabulary is compared, and its answers with the merged model's: where they differ too much that is
said, with what to take instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from convert.export.llamacpp_tools import tail
from convert.export.onnx_graph import complete
from convert.export.source import TEMPLATE, read_json, read_template
from convert.model.hf_folder import SMALL, parameters
from convert.verify.onnx_quality import QUESTIONS, Quality, measure
from convert.verify.probes import TEXTS as PROBES
from edge.artefact import manifest
from edge.artefact.onnx_header import OUTPUT_POSITIONS, OnnxHeader, read_onnx
from edge.backends.onnx_tokenizer import Vocabulary
from edge.chat_template import ChatTemplate
from edge.errors import EdgeError, InputError, RequestError, UnavailableError, UsageError
from edge.machine import hardware

PRECISIONS = ("int4", "int8", "fp16", "fp32")
# How 4-bit weights are chosen: by blocks of 32, by llama.cpp's k-quant search, and that with the most
# sensitive matrices in 8 bits.
SCHEMES = {
    "block": {"algo_config": "rtn"},
    "k-quant": {"algo_config": "k_quant"},
    "mixed": {"algo_config": "k_quant", "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"},
}
# Values that share a scale: products of longer blocks are quicker, and as near where activations are even.
BLOCK, LONG_BLOCK = 32, 64
EPS = ("cpu", "cuda")
# The largest logits that a graph for a card gives without the others: what people sample from is less.
CANDIDATES = 64
_FILES = ("tokenizer.json", "tokenizer_config.json", TEMPLATE)


def run(
    run_folder: Path,
    *,
    precision: str | None = None,
    scheme: str = "mixed",
    ep: str = "cpu",
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Export `run_folder/merged` to `run_folder/onnx`. Returns the path of the ONNX file.

    precision: None takes int8 for small models, int4 for others. Raises UsageError for what is not known,
    UnavailableError without the builder, InputError for a run without a usable merged model, ExistsError
    without `overwrite`.
    """
    merged = run_folder / "merged"
    if run_folder.is_dir() and not merged.is_dir():
        raise InputError(f"{run_folder} has no merged model", f"make it: edge merge {run_folder}")
    return export(
        merged,
        run_folder / "onnx",
        precision=precision,
        scheme=scheme,
        ep=ep,
        overwrite=overwrite,
        console=console,
    )


def export(
    source: Path,
    target: Path,
    *,
    precision: str | None = None,
    scheme: str = "mixed",
    ep: str = "cpu",
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Export the transformers folder `source` (with edge.json) to the folder `target`; as `run`."""
    console = console or Console(markup=False, highlight=False, soft_wrap=True)
    origin = manifest.read(source)
    source, target = source.resolve(), target.absolute()
    template = read_template(source, origin)
    config = read_json(source / "config.json")
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{source} has no *.safetensors file", "merge again: edge merge RUN")
    numbers = parameters(weights, config)
    precision = precision or ("int8" if numbers < SMALL else "int4")
    _check(precision, scheme, ep)
    manifest.check_target(target, overwrite)
    # The builder writes whole weights before it quantises.
    manifest.check_free(target.parent, (9 if precision == "int8" else 5) * numbers)
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]+', "-", origin.name).strip(" .-") or "model"

    with manifest.publish(target, overwrite=overwrite) as partial:
        final = partial / f"{name}-{precision}.onnx"
        even, block, activations = source, BLOCK, None
        # A card computes with activations as they are.
        if precision == "int8" and ep == "cpu":
            with console.status(f"evening out the activations of {source}"):
                even, block, activations = _evened(source, origin, partial / "even")
        with console.status(f"building {final.name} from {source}"):
            _build(even, final, precision, scheme, ep, block)
            decoder = read_json(partial / "genai_config.json")["model"]["decoder"]
            complete(
                final,
                OUTPUT_POSITIONS,
                int(decoder["head_size"]),
                width=int(decoder["hidden_size"]),
                # A processor reads the whole logits where they lie; a card would have to copy them.
                candidates=CANDIDATES if ep == "cuda" else 0,
            )
        for file in _FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, partial / file)
        header = read_onnx(final)
        _keep_only(partial, {*header.files, *_FILES, "genai_config.json"})
        vocabulary = Vocabulary(partial, header.vocab_size)
        verify = _verify(header, source, config, vocabulary)
        with console.status("comparing its answers with the merged model's"):
            quality = _quality(final, source, template, origin, vocabulary, ep)
        verify["quality"] = quality if isinstance(quality, str) else quality.facts()
        manifest.write(
            partial,
            manifest.Manifest(
                stage="onnx",
                name=origin.name,
                base_model=origin.base_model,
                parents=[origin.parent(source)],
                settings={
                    "precision": precision,
                    "scheme": scheme if precision == "int4" else None,
                    "activations": activations,
                    "ep": ep,
                    "file": final.name,
                    "matrices": {f"{bits} bits": count for bits, count in header.matrices.items()},
                },
                chat_template=manifest.text_digest(template),
                stop_ids=origin.stop_ids,
                thinking=origin.thinking,
                verify=verify,
                versions=manifest.versions(
                    "edge", "onnx", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "tokenizers"
                ),
            ),
        )
    console.print(f"{target / final.name}: {precision}, {header.weights_bytes / 2**20:.0f} MiB")
    if activations:
        console.print(f"  activations {activations}")
    if isinstance(quality, str):
        console.print(f"  warning: not compared with the merged model: {quality}")
        return target / final.name
    console.print(
        f"  against the merged model over {quality.positions} tokens: the same most probable token at "
        f"{quality.top1:.1%}, mean KL {quality.kl:.2g}, logits differ by {quality.difference:.2g} at most"
    )
    if advice := proposal(quality, precision, scheme):
        console.print(f"  warning: {advice}")
    return target / final.name


def proposal(quality: Quality, precision: str, scheme: str) -> str:
    """What to take instead of an export whose answers differ too much; "" where nothing is needed."""
    if not quality.poor:
        return ""
    instead = "--precision int8"
    if precision == "int4" and scheme != "mixed":
        instead += ", or --precision int4 --scheme mixed"
    elif precision != "int4":
        instead = "--precision fp32"
    return f"its answers are not the merged model's; export again with {instead}"


def _check(precision: str, scheme: str, ep: str) -> None:
    for option, value, known in (
        ("--precision", precision, PRECISIONS),
        ("--scheme", scheme, tuple(SCHEMES)),
        ("--ep", ep, EPS),
    ):
        if value not in known:
            raise UsageError(f"{option} {value}: not known", f"one of {', '.join(known)}")
    if precision == "fp32" and ep == "cuda":
        raise UsageError(
            "--precision fp32 --ep cuda: a card's attention computes in fp16", "take --precision fp16"
        )
    if precision == "fp16" and ep == "cpu":
        raise UsageError(
            "--precision fp16: processors compute in fp32", "add --ep cuda, or take --precision fp32"
        )


def _evened(source: Path, origin: manifest.Manifest, target: Path) -> tuple[Path, int, str]:
    """The folder to build from, in blocks of how many, and what was done in words.

    That is `source` itself where its activations cannot be measured.
    """
    # Imported late: it takes torch.
    from convert.export import smoothquant

    try:
        layers, rows = smoothquant.run(source, origin, target)
    except InputError as error:
        shutil.rmtree(target, ignore_errors=True)
        return source, BLOCK, f"as they are, in blocks of {BLOCK}: {error.message}"
    return target, LONG_BLOCK, f"evened out in {layers} layers on {rows}, in blocks of {LONG_BLOCK}"


def _build(source: Path, final: Path, precision: str, scheme: str, ep: str, block: int) -> None:
    # The folder is here: no token for the hub is to be looked for.
    options = {"filename": final.name, "hf_token": "false", "block_size": str(block)}
    if precision == "int4":
        options |= SCHEMES[scheme]
    with tempfile.TemporaryDirectory(prefix="edge-onnx-") as cache:
        command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(source), "-o", str(final.parent), "-p", precision, "-e", ep, "-c", cache]
        command += ["--extra_options", *(f"{key}={value}" for key, value in options.items())]
        env = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, env=env, cwd=cache, check=False)
    if done.returncode == 0 and final.is_file():
        return
    log = (done.stdout + done.stderr).decode("utf-8", "replace")
    if missing := re.search(r"No module named '([\w.]+)'", log):
        raise UnavailableError(
            f"exporting ONNX needs the package '{missing[1]}', which is not installed",
            "pip install -c constraints.txt -e '.[train,export-onnx]'",
        )
    if unknown := re.search(r"The (\S+) model is not currently supported", log):
        raise InputError(
            f"onnxruntime-genai's builder does not know the architecture {unknown[1]}",
            "export GGUF: edge export gguf RUN",
        )
    raise EdgeError(
        f"onnxruntime-genai's builder failed on {source}:\n{tail(log)}", "its last lines are above"
    )


def _keep_only(folder: Path, names: set[str]) -> None:
    """Remove what the builder leaves beside: configurations that nothing here reads."""
    for path in folder.iterdir():
        if path.name in names:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _verify(
    header: OnnxHeader, source: Path, config: dict[str, Any], vocabulary: Vocabulary
) -> dict[str, Any]:
    """Compare shape and vocabulary with the folder it was made from. Raises InputError for a difference."""
    again = "the file was not published"
    text_config = config.get("text_config") or config
    for what, found, wanted in (
        ("layers", header.block_count, text_config.get("num_hidden_layers")),
        ("tokens", header.vocab_size, text_config.get("vocab_size")),
        ("positions", header.context_length, text_config.get("max_position_embeddings")),
    ):
        if found != wanted:
            raise InputError(f"{header.path.name} has {found} {what}, config.json says {wanted}", again)
    for text in PROBES:
        made = b"".join(vocabulary.decode(token) for token in vocabulary.encode(text, special=False))
        # SentencePiece puts a space in front.
        if made.removeprefix(b" ") != text.encode("utf-8").removeprefix(b" "):
            raise InputError(
                f"{source / 'tokenizer.json'}: {text[:60]!r} becomes {made[:60]!r} when tokens are joined",
                again,
            )
    return {"chat_template": "equal", "vocab_size": header.vocab_size, "probe_texts": len(PROBES)}


def _quality(
    final: Path, source: Path, template: str, origin: manifest.Manifest, vocabulary: Vocabulary, ep: str
) -> Quality | str:
    """How near the answers are; or why a file for a card cannot be loaded here."""
    form = ChatTemplate(template, bos=vocabulary.bos_text, eos=vocabulary.eos_text)
    prompts = []
    for question in QUESTIONS:
        try:
            text = form.render([{"role": "user", "content": question}], thinking=origin.thinking)
        except RequestError as error:
            raise InputError(
                f"{source / TEMPLATE}: {error.message}", "the template must take a user's turn"
            ) from error
        ids = vocabulary.encode(text, special=True)
        begins = bool(vocabulary.bos_text) and text.startswith(vocabulary.bos_text)
        if vocabulary.add_bos and vocabulary.bos_id is not None and not begins:
            ids.insert(0, vocabulary.bos_id)
        prompts.append(ids)
    try:
        return measure(
            final,
            source,
            prompts,
            origin.stop_ids,
            threads=hardware.cpu_threads(),
            device="cpu" if ep == "cpu" else "auto",
        )
    except EdgeError as error:
        if ep == "cpu":
            raise
        return error.message
