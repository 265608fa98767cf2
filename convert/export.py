"""`edge export FORMAT RUN`: the merged model of a run as an artefact that a backend serves."""

from __future__ import annotations

import argparse
from pathlib import Path

from convert import gguf


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge export", description=__doc__)
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    to_gguf = formats.add_parser("gguf", help="RUN/merged -> RUN/gguf, for llama.cpp")
    to_gguf.add_argument("run", type=Path, metavar="RUN", help="the run folder, with merged/ in it")
    to_gguf.add_argument(
        "--quant", default=gguf.DEFAULT, help=f"one of {', '.join(gguf.QUANTS)} (%(default)s)"
    )
    to_gguf.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    options = parser.parse_args(argv)
    gguf.run(options.run, quant=options.quant, overwrite=options.overwrite)
    return 0
