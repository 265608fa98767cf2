"""Merged model -> ONNX: onnxruntime-genai's model builder, then proof of how near it came.

    RUN/merged/ -> RUN/onnx/<name>-<precision>.onnx, its weights beside it

The builder runs in a process of its own. Before the folder is published the file is read as the server reads
it, and compared with the merged model as `edge verify` does it: where logits differ too much, a warning names
what to take instead.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from convert.export.llamacpp_tools import run_exporter
from convert.export.onnx_options import SCHEMES, Recipe
from convert.export.source import Source, open_source
from convert.model.hf_folder import SMALL, parameters, stage_folder
from convert.verify import compare
from convert.verify.onnx_reader import OnnxReader
from convert.verify.torch_reader import TorchReader
from edge.artefact import json_file, manifest
from edge.artefact.find import TEMPLATE
from edge.artefact.onnx_header import OUTPUT_POSITIONS, OnnxHeader, read_onnx
from edge.console import plain_console
from edge.errors import InputError
from edge.progress import phase

# Values that share a scale: products of longer blocks are faster, and as near where activations are smoothed.
BLOCK, LONG_BLOCK = 32, 64
# The largest logits that a graph for a GPU gives without the others: what people sample from is less.
CANDIDATES = 64
_FILES = ("tokenizer.json", "tokenizer_config.json", TEMPLATE)
_CONFIG = "genai_config.json"
_PACKAGES = ("onnx", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "tokenizers")


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
    UnavailableError without the builder, InputError for a run without a usable merged model or an export that
    is not that model, ExistsError without `overwrite`.
    """
    source = open_source(stage_folder(run_folder, "merged"))
    small = parameters(source.weights, source.config) < SMALL
    recipe = Recipe(precision or ("int8" if small else "int4"), scheme, ep)
    return export(source, run_folder / "onnx", recipe, overwrite=overwrite, console=console)


def export(
    source: Source, target: Path, recipe: Recipe, *, overwrite: bool = False, console: Console | None = None
) -> Path:
    """Export the transformers folder `source` to the folder `target`; as `run`."""
    console = console or plain_console()
    target = target.absolute()
    manifest.check_target(target, overwrite)
    # The builder writes whole weights before it quantises.
    need = 9 if recipe.precision == "int8" else 5
    manifest.check_free(target.parent, need * parameters(source.weights, source.config))
    with manifest.publish(target, overwrite=overwrite) as partial:
        # onnxruntime writes names in UTF-8 alone, whatever the locale.
        plain = source.file_name.isascii() or sys.getfilesystemencoding() == "utf-8"
        final = partial / f"{source.file_name if plain else 'model'}-{recipe.precision}.onnx"
        weights, block, activations = _smoothed(source, recipe, partial / "smoothed", console)
        with phase(console, f"building {final.name} from {source.path}"):
            _build(weights, final, recipe, block)
            header = _finish(source, final, recipe)
        settings = {
            "precision": recipe.precision,
            "scheme": recipe.scheme if recipe.precision == "int4" else None,
            "activations": activations,
            "ep": recipe.ep,
            "file": final.name,
            "matrices": {f"{bits} bits": count for bits, count in header.matrices.items()},
        }
        source.write_manifest(partial, "onnx", settings, _PACKAGES, {"vocab_size": header.vocab_size})
        report = _prove(source.path, final, recipe.ep, console)
    console.print(f"{target / final.name}: {recipe.precision}, {header.weights_bytes / 2**20:.0f} MiB")
    if activations:
        console.print(f"  activations {activations}")
    compare.summary(report, console)
    return target / final.name


def _smoothed(source: Source, recipe: Recipe, target: Path, console: Console) -> tuple[Path, int, str | None]:
    """(folder to build from, length of a block, what was done to the activations, for the manifest).

    The folder is `target` for int8 on a processor; the source itself where activations are not rounded, or
    cannot be measured.
    """
    if recipe.precision != "int8" or recipe.ep != "cpu":
        return source.path, BLOCK, None
    # Imported late: it takes torch.
    from convert.export import smoothquant

    try:
        with phase(console, f"smoothing the activations of {source.path}"):
            layers, rows = smoothquant.run(source.path, source.record, target)
    except InputError as error:
        shutil.rmtree(target, ignore_errors=True)
        return source.path, BLOCK, f"as they are, in blocks of {BLOCK}: {error.message}"
    return target, LONG_BLOCK, f"smoothed in {layers} layers on {rows}, in blocks of {LONG_BLOCK}"


def _build(source: Path, final: Path, recipe: Recipe, block: int) -> None:
    # The folder is here: no token for the hub is to be looked for.
    options = {"filename": final.name, "hf_token": "false", "block_size": str(block)}
    if recipe.precision == "int4":
        options |= SCHEMES[recipe.scheme]
    with tempfile.TemporaryDirectory(prefix="edge-onnx-") as cache:
        arguments = ["-P", "-m", "onnxruntime_genai.models.builder"]
        arguments += ["-i", str(source), "-o", str(final.parent), "-c", cache]
        arguments += ["-p", recipe.precision, "-e", recipe.ep]
        arguments += ["--extra_options", *(f"{key}={value}" for key, value in options.items())]
        run_exporter(
            "onnxruntime-genai's builder",
            arguments,
            final,
            refusals={
                r"The (\S+) model is not currently supported": (
                    "onnxruntime-genai's builder does not know the architecture {}",
                    "export GGUF: edge export gguf RUN",
                )
            },
            extras="train,export-onnx",
        )


def _finish(source: Source, final: Path, recipe: Recipe) -> OnnxHeader:
    """Complete the graph, put the tokenizer beside it, remove what nothing reads; the header, checked.

    Raises InputError where the graph is not of the shape that config.json names.
    """
    # Imported late: it takes onnx.
    from convert.export.onnx_graph import complete

    folder = final.parent
    decoder = json_file.read(folder / _CONFIG, required=True)["model"]["decoder"]
    # A processor reads the whole logits where they lie; a GPU would have to copy them.
    candidates = CANDIDATES if recipe.ep == "cuda" else 0
    complete(
        final,
        OUTPUT_POSITIONS,
        int(decoder["head_size"]),
        width=int(decoder["hidden_size"]),
        candidates=candidates,
    )
    for name in _FILES:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    header = read_onnx(final)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in {*header.files, *_FILES, _CONFIG}:
            path.unlink()
    config: dict[str, Any] = source.config.get("text_config") or source.config
    for what, value, wanted in (
        ("layers", header.block_count, config.get("num_hidden_layers")),
        ("tokens", header.vocab_size, config.get("vocab_size")),
        ("positions", header.context_length, config.get("max_position_embeddings")),
    ):
        if value != wanted:
            raise InputError(
                f"{final.name} has {value} {what}, config.json says {wanted}", "the file was not published"
            )
    return header


def _prove(source: Path, final: Path, ep: str, console: Console) -> compare.Report:
    """Compare with the merged model; a file for a GPU may be one that cannot be loaded here."""
    reader = OnnxReader(final)
    if ep == "cpu":
        reader.load()
    return compare.prove(TorchReader(source), reader, console)
