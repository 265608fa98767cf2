"""`edge predict MODEL QUESTIONS`: its arguments. edge.batch_answers loads the model and asks it."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge.arguments import PATH_HELP, add_loading_options
from edge.errors import UsageError
from edge.progress import add_progress_option


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="edge predict", description="Answer a file of questions: OUT/generated_predictions.jsonl."
    )
    parser.add_argument("path", type=Path, metavar="MODEL", help=PATH_HELP)
    parser.add_argument("questions", type=Path, help="json, jsonl or csv rows as for training, or txt")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder of the answers (default: here)")
    parser.add_argument("--lora", type=Path, metavar="ADAPTER", help="an adapter (edge export lora) on top")
    parser.add_argument("--system", default="", help="the system prompt of rows without one")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampled answers (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer (%(default)s)")
    parser.add_argument("--slots", type=int, help="questions that are answered at once")
    add_loading_options(parser)
    add_progress_option(parser)
    args = parser.parse_args(argv)
    if not 0.0 <= args.temperature <= 2.0:
        raise UsageError(f"--temperature {args.temperature} is not within 0..2")
    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens} is not positive")
    # Imported late: --help and a wrong argument are answered at once.
    from edge import batch_answers

    return batch_answers.run(args)
