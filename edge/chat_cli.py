"""`edge chat RUN`: its arguments. edge.terminal_chat holds the conversation."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge.arguments import PATH_HELP, add_loading_options
from edge.errors import UsageError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge chat", description="Talk to a model in the terminal.")
    parser.add_argument("path", type=Path, help=PATH_HELP)
    parser.add_argument("--system", help="a system prompt")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the likeliest tokens that add up to it")
    parser.add_argument("--top-k", type=int, default=0, help="of so many of the likeliest tokens; 0: all")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions")
    parser.add_argument("--max-tokens", type=int, help="default: until the context is full")
    parser.add_argument("--ctx", type=int, help="tokens that the conversation may hold")
    add_loading_options(parser)
    args = parser.parse_args(argv)
    if not 0.0 <= args.temperature <= 2.0:
        raise UsageError(f"--temperature {args.temperature} is not within 0..2")
    if not 0.0 < args.top_p <= 1.0:
        raise UsageError(f"--top-p {args.top_p} is not within 0..1")
    if args.top_k < 0:
        raise UsageError(f"--top-k {args.top_k} is negative")
    if args.repetition_penalty <= 0.0:
        raise UsageError(f"--repetition-penalty {args.repetition_penalty} is not positive")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens} is not positive")
    # Imported late: --help and a wrong argument are answered at once.
    from edge import terminal_chat

    return terminal_chat.run(args)
