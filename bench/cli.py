"""`edge bench RUN`: the tutorial's server and ours, side by side, on the same model; and others, if asked.

All servers are started, and one of them works at a time: baseline, edge, baseline, edge ..., with the same
prompts and the same forced number of greedy tokens. `/health` is asked all the while. Where the memory does
not hold all, they are started in turn. Nothing is compared that did different work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from urllib.parse import urlsplit

from bench.measure.workloads import WORKLOADS, Plan, counts
from bench.servers.address import name_and_url
from edge.errors import UsageError
from edge.progress import add_progress_option, result

QUICK = Plan(tokens=32, rounds=2, budget_s=40.0)
# What `bench.side_by_side.targets` makes. The first one named is what the others are compared with.
TARGETS = (
    "baseline", "baseline-bf16", "transformers-static", "edge", "edge-onnx", "genai", "llama-server",
    "xllamacpp", "llama_cpp.server",
)  # fmt: skip


def main(argv: list[str]) -> int:
    if argv[:1] == ["compare"]:
        from bench.report import compare

        return compare.main(argv[1:])
    if argv[:1] == ["train"]:
        from bench.training import run as train

        return train.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="edge bench",
        description="Measure RUN against the slow baseline. Also: `edge bench compare A.json B.json`, what "
        "changed between two reports; `edge bench train CONFIG.yaml`, training beside a plain loop.",
    )
    parser.add_argument("run", type=Path, help="a run folder with merged/ and gguf/")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds: under a minute or two")
    parser.add_argument("--tokens", type=int, help="output tokens of every answer")
    parser.add_argument("--clients", help="numbers of clients, such as 1,8")
    parser.add_argument("--workloads", help=f"some of {','.join(WORKLOADS)} (default: mixed)")
    parser.add_argument(
        "--targets",
        help=f"some of {','.join(TARGETS)} (default: baseline,edge), or NAME=URL[#MODEL] for a server that "
        "runs already and speaks OpenAI's completions, or Ollama's interface where the URL ends with /api",
    )
    parser.add_argument("--sweep", action="store_true", help="how many requests a second each target stands")
    parser.add_argument("--budget", type=float, help="seconds that the rounds may take")
    parser.add_argument("--out", type=Path, help="where the report goes (default: the run folder)")
    add_progress_option(parser)
    args = parser.parse_args(argv)
    base = QUICK if args.quick else Plan()
    tokens = base.tokens if args.tokens is None else args.tokens
    if not 2 <= tokens <= 4096:
        raise UsageError(f"--tokens {tokens} is not within 2..4096")
    clients = counts(args.clients) if args.clients is not None else base.clients
    if max(clients) > 256:
        raise UsageError(f"--clients {max(clients)} is more than 256")
    plan = dataclasses.replace(
        base,
        tokens=tokens,
        # What was asked for by number is not shortened.
        least=base.least if args.tokens is None else tokens,
        clients=tuple(dict.fromkeys(clients)),
        workloads=base.workloads if args.workloads is None else workload_names(args.workloads),
        targets=base.targets if args.targets is None else target_names(args.targets),
        budget_s=base.budget_s if args.budget is None else args.budget,
        sweep=args.sweep,
    )
    # Late: a wrong argument is refused at once.
    from bench.report import build
    from bench.side_by_side import run

    report = run(args.run, plan, out=args.out, command="edge bench " + shlex.join(argv))
    result(**build.headline(report))
    sys.stdout.write(json.dumps(build.headline(report), ensure_ascii=False) + "\n")
    return 0


def workload_names(words: str) -> tuple[str, ...]:
    """The comma-separated workloads, each once. Raises UsageError for one that there is not."""
    names = tuple(dict.fromkeys(name.strip() for name in words.split(",")))
    if unknown := [name for name in names if name not in WORKLOADS]:
        choices = f"there are {', '.join(WORKLOADS)}"
        raise UsageError(f"--workloads: there is no '{unknown[0]}'", choices)
    return names


def target_names(words: str) -> tuple[str, ...]:
    """The comma-separated targets, as given. Raises UsageError for what is none, or has another's name."""
    targets = tuple(dict.fromkeys(name.strip() for name in words.split(",")))
    for target in targets:
        if "=" in target:
            name_and_url(target, "--targets")
        elif target not in TARGETS:
            choices = f"there are {', '.join(TARGETS)}; or give NAME=URL"
            raise UsageError(f"--targets: there is no '{target}'", choices)
    names = [target.partition("=")[0] for target in targets]
    for name in names:
        if names.count(name) > 1 or (f"{name}=" in words and name in TARGETS):
            raise UsageError(f"--targets: the name '{name}' is taken", "give the URL another name")
    hosts = [urlsplit(target.partition("=")[2]).netloc for target in targets if "=" in target]
    if len(hosts) != len(set(hosts)):
        raise UsageError(
            "--targets: two of them are the same server, which would reuse what it read for the other",
            "measure one after the other, with --out for each",
        )
    return targets
