"""`edge export FORMAT RUN`: the merged model of a run as an artefact that a backend serves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convert.export import gguf, gguf_lora, gguf_split, llamacpp_tools, modelfile, onnx, quant_search
from convert.model.hf_folder import shell
from edge.errors import UsageError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge export", description=__doc__)
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    to_gguf = formats.add_parser("gguf", help="RUN/merged -> RUN/gguf, for llama.cpp")
    to_gguf.add_argument("run", type=Path, metavar="RUN", help="the run folder, with merged/ in it")
    default = f"{gguf.DEFAULT}, {gguf.DEFAULT_SMALL} below a billion parameters"
    to_gguf.add_argument("--quant", help=f"one of {', '.join(llamacpp_tools.QUANTS)} (default: {default})")
    to_gguf.add_argument(
        "--ladder", action="store_true", help="measure several types here, export the one that fits best"
    )
    to_gguf.add_argument(
        "--imatrix", action="store_true", help="weigh by the data set's activations, where that is closer"
    )
    to_gguf.add_argument(
        "--gptq",
        action="store_true",
        help="round so that weights make up for one another on the data set",
    )
    to_gguf.add_argument(
        "--split-max-size", metavar="SIZE", help="several files of at most this, as 500M or 2G"
    )
    to_gguf.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    to_lora = formats.add_parser("lora", help="an adapter as GGUF, for edge serve BASE.gguf --lora")
    to_lora.add_argument("run", type=Path, metavar="RUN", help="the run folder, with adapter/ in it")
    to_lora.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    to_ollama = formats.add_parser("ollama", help="a Modelfile beside the GGUF, for ollama create")
    to_ollama.add_argument("run", type=Path, metavar="RUN", help="a run, a folder with a GGUF, or the file")
    to_ollama.add_argument("--ctx", type=int, default=4096, help="tokens of a conversation (%(default)s)")
    to_onnx = formats.add_parser("onnx", help="RUN/merged -> RUN/onnx, for onnxruntime")
    to_onnx.add_argument("run", type=Path, metavar="RUN", help="the run folder, with merged/ in it")
    to_onnx.add_argument(
        "--precision", choices=onnx.PRECISIONS, help="default: int8 below a billion parameters, else int4"
    )
    to_onnx.add_argument(
        "--scheme", choices=tuple(onnx.SCHEMES), default="mixed", help="of int4 (%(default)s)"
    )
    to_onnx.add_argument("--ep", choices=onnx.EPS, default="cpu", help="what it is for (%(default)s)")
    to_onnx.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parser.parse_args(argv)
    if options.format == "onnx":
        onnx.run(
            options.run,
            precision=options.precision,
            scheme=options.scheme,
            ep=options.ep,
            overwrite=options.overwrite,
        )
        return 0
    if options.format == "lora":
        made = gguf_lora.run(options.run, overwrite=options.overwrite)
        sys.stdout.write(f"{made}\n  serve it: edge serve BASE.gguf --lora {shell(made)}\n")
        return 0
    if options.format == "ollama":
        made = modelfile.run(options.run, context=options.ctx)
        name = shell(made.parent.absolute().parent.name.lower())
        sys.stdout.write(f"{made}\n  take it: ollama create {name} -f {shell(made)}\n")
        return 0
    if options.ladder:
        if options.quant or options.imatrix or options.gptq or options.split_max_size:
            raise UsageError(
                "--ladder chooses type and rounding itself, and keeps one file", "leave the other options out"
            )
        quant_search.run(options.run, overwrite=options.overwrite)
        return 0
    split = gguf_split.parse_size(options.split_max_size) if options.split_max_size else 0
    gguf.run(
        options.run,
        quant=options.quant,
        imatrix=options.imatrix,
        gptq=options.gptq,
        split=split,
        overwrite=options.overwrite,
    )
    return 0
