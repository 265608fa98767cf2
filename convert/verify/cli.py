"""`edge verify A B` and `edge verify A URL`: arguments, apart from what compares and takes long to import."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from edge.arguments import VERIFY_KEY
from edge.errors import UsageError
from edge.progress import add_progress_option, result


def main(argv: list[str]) -> int:
    description = "Proof that stage B, or what answers at a URL, is still the model that stage A is."
    parser = argparse.ArgumentParser(prog="edge verify", description=description)
    parser.add_argument("a", type=Path, metavar="A", help="a stage's folder, or a .gguf file")
    parser.add_argument("b", metavar="B", help="what was made from it, or the URL of a server")
    parser.add_argument("--lora", type=Path, metavar="ADAPTER.gguf", help="goes on top of B, a base as GGUF")
    parser.add_argument("--model", default="", metavar="NAME", help="of a server with several models")
    parser.add_argument("--api-key", metavar="KEY", help=f"of a server (default: the variable {VERIFY_KEY})")
    add_progress_option(parser)
    options = parser.parse_args(argv)
    if re.match("https?://", options.b):
        if options.lora is not None:
            raise UsageError("--lora goes on top of a file, not of a server", "leave it out")
        from convert.verify import served

        key = options.api_key or os.environ.get(VERIFY_KEY, "")
        report = served.run(options.a, options.b, model=options.model, key=key)
    else:
        if options.model or options.api_key:
            raise UsageError(
                f"--model and --api-key are for a server, {options.b} is no URL", "leave them out"
            )
        from convert.verify import compare

        report = compare.run(options.a, Path(options.b), lora=options.lora)
    result(**report.numbers())
    return 0
