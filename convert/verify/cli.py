"""`edge verify A B`: its arguments, apart from convert.verify.compare, which takes long to import."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge.progress import add_progress_option, result


def main(argv: list[str]) -> int:
    description = "Proof that stage B is still the model that stage A is."
    parser = argparse.ArgumentParser(prog="edge verify", description=description)
    parser.add_argument("a", type=Path, metavar="A", help="a stage's folder, or a .gguf file")
    parser.add_argument("b", type=Path, metavar="B", help="what was made from it")
    parser.add_argument("--lora", type=Path, metavar="ADAPTER.gguf", help="goes on top of B, a base as GGUF")
    add_progress_option(parser)
    options = parser.parse_args(argv)
    from convert.verify import compare

    result(**compare.run(options.a, options.b, lora=options.lora).numbers())
    return 0
