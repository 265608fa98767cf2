"""`edge export FORMAT RUN`: the merged model of a run as an artefact that a backend serves."""

from __future__ import annotations

import argparse
from pathlib import Path

from convert import gguf, onnx


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge export", description=__doc__)
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    to_gguf = formats.add_parser("gguf", help="RUN/merged -> RUN/gguf, for llama.cpp")
    to_gguf.add_argument("run", type=Path, metavar="RUN", help="the run folder, with merged/ in it")
    to_gguf.add_argument(
        "--quant", default=gguf.DEFAULT, help=f"one of {', '.join(gguf.QUANTS)} (%(default)s)"
    )
    to_gguf.add_argument("--overwrite", action="store_true", help="replace an earlier export")
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
    else:
        gguf.run(options.run, quant=options.quant, overwrite=options.overwrite)
    return 0
