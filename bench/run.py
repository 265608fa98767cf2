"""`edge bench RUN`: the tutorial's server and ours, side by side, on the same model.

Both servers are started, and one of them works at a time: baseline, edge, baseline, edge ..., with the same
prompts and the same forced number of greedy tokens. `/health` is asked all the while. Where the memory does
not hold both, they are started in turn. Nothing is compared that did different work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import prompts, report
from bench.bare import counts
from bench.baseline import DTYPES
from bench.load import HealthProbe, Job, ask, closed_loop, get
from bench.metrics import Sample, token_rate
from bench.probe import noise, tree_cpu
from bench.targets import Running, Target, baseline, ours, started
from edge import artefact, hardware, manifest
from edge.errors import EdgeError, InputError, UsageError

SEED = 1
WARM_TOKENS = 16
PAUSE_S = 0.3


@dataclass(frozen=True)
class Plan:
    """What to measure. budget_s: seconds that the measured rounds may take; at most `rounds` of each case.

    Where one round of each does not fit, answers are shortened to no less than `least` tokens.
    """

    tokens: int = 64
    least: int = 16
    clients: tuple[int, ...] = (1, 8)
    dtype: str = "float32"
    rounds: int = 5
    budget_s: float = 100.0


QUICK = Plan(tokens=32, rounds=2, budget_s=40.0)


@dataclass
class Round:
    """One pass of one target. idle: the share of a processor that the other server used meanwhile."""

    samples: list[Sample]
    health: list[float]
    health_failures: int
    idle: float


@dataclass
class Measured:
    """One target's part. rounds: by number of clients, in order."""

    target: Target
    load_s: float = 0.0
    memory_peak: int = 0
    memory_steady: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, list[Round]] = field(default_factory=dict)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge bench", description="Measure RUN against the slow baseline.")
    parser.add_argument("run", type=Path, help="a run folder with merged/ and gguf/")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds: under a minute or two")
    parser.add_argument("--tokens", type=int, help="output tokens of every answer")
    parser.add_argument("--clients", help="numbers of clients, such as 1,8")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the baseline's weights")
    parser.add_argument("--out", type=Path, help="where the report goes (default: the run folder)")
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
        dtype=args.dtype,
    )
    with stopped_by_signals():
        made = run(args.run, plan, out=args.out, command="edge bench " + shlex.join(argv))
    sys.stdout.write(json.dumps(report.headline(made), ensure_ascii=False) + "\n")
    return 0


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """A termination signal is treated like Ctrl-C, so that every server that was started is stopped."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(folder: Path, plan: Plan, *, out: Path | None = None, command: str = "") -> dict[str, Any]:
    """Measure the run, show the table, write report.json and report.md to `out`; returns the report.

    Raises InputError where the run lacks a part or its GGUF is not of its merged model, EdgeError where a
    server does not start or the two read different prompts.
    """
    began = time.perf_counter()
    found = artefact.resolve(folder)
    merged = folder / "merged"
    check_same_model(folder)
    out = out or folder
    console = Console(stderr=True)
    with console.status("listening how quiet the machine is"):
        before = noise()
    pair = (baseline(merged, plan.dtype), ours(folder))
    need = baseline_bytes(merged, plan.dtype) + 2 * found.header.weights_bytes + 2**30
    together = need < hardware.memory().available
    with console.status("") as status:
        say = status.update if console.is_terminal else console.print
        measured, kept = measure(pair, plan, out / "bench", together=together, say=say)
    made = report.build(
        measured,
        plan=kept,
        asked_tokens=plan.tokens,
        command=command,
        model=describe(folder, found),
        noise=(before, noise()),
        together=together,
        seconds=time.perf_counter() - began,
    )
    report.write(made, out)
    report.show(made, Console())
    return made


def check_same_model(folder: Path) -> None:
    """Raise InputError unless RUN/merged is there and RUN/gguf says that it was made from it."""
    merged = manifest.read(folder / "merged")
    parents = manifest.read(folder / "gguf").parents
    if merged.digest not in [parent["digest"] for parent in parents]:
        raise InputError(
            f"{folder / 'gguf'} was not made from {folder / 'merged'}: the two would not be the same model",
            f"edge export gguf {shlex.quote(str(folder))} --overwrite",
        )


def baseline_bytes(merged: Path, dtype: str) -> int:
    """Memory that the baseline will take, from its files: 16-bit weights, in its dtype, and torch itself."""
    weights = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    return weights * (2 if dtype == "float32" else 1) + 2**30


def describe(folder: Path, found: artefact.Artefact) -> dict[str, Any]:
    merged = manifest.read(folder / "merged")
    return {
        "run": folder.name,
        "base_model": merged.base_model,
        "merged": {
            "digest": merged.digest,
            "bytes": sum(file.stat().st_size for file in (folder / "merged").glob("*.safetensors")),
        },
        "gguf": {"digest": found.digest, "file": found.path.name, "bytes": found.path.stat().st_size},
    }


def measure(
    pair: Sequence[Target], plan: Plan, logs: Path, *, together: bool, say: Any = lambda text: None
) -> tuple[list[Measured], Plan]:
    """Start, warm and drive the targets of `pair`; what was measured, in that order, and the plan as kept.

    together: both run at once and rounds alternate; otherwise one after the other. The first target is the
    slow one: its speed decides what fits into the budget (see `schedule`). Raises what `started` raises, and
    EdgeError where the targets count a prompt's tokens differently.
    """
    measured = [Measured(target) for target in pair]
    reads: dict[int, int] = {}
    rounds: dict[int, int] = {}
    with contextlib.ExitStack() as both:
        running: list[Running] = []
        for part in measured:
            stack = both if together else contextlib.ExitStack()
            with contextlib.nullcontext() if together else stack:
                say(f"starting {part.target.name}")
                server = stack.enter_context(started(part.target, logs / f"{part.target.name}.log"))
                running.append(server)
                part.load_s = server.load_s
                part.about = _about(server)
                say(f"warming {part.target.name}")
                rate = _warm(server, plan, reads)
                if not rounds:
                    plan, rounds = schedule(plan, rate)
                if not together:
                    since = time.perf_counter()
                    for clients, number in _cases(rounds):
                        say(f"{part.target.name}: {clients} at once, round {number + 1}")
                        _round(part, server, None, plan, clients, number)
                    _memory(part, server, since)
        if together:
            since = time.perf_counter()
            for clients, number in _cases(rounds):
                for part, server in zip(measured, running, strict=True):
                    say(f"{part.target.name}: {clients} at once, round {number + 1} of {rounds[clients]}")
                    other = next(s for s in running if s is not server)
                    _round(part, server, other, plan, clients, number)
            for part, server in zip(measured, running, strict=True):
                _memory(part, server, since)
    return measured, plan


def schedule(plan: Plan, rate: float) -> tuple[Plan, dict[int, int]]:
    """The plan, with shorter answers if need be, and the rounds for each number of clients; at least one.

    rate: tokens/s of the slow target, which answers one after the other.
    """

    def seconds(clients: int) -> float:
        # A fifth more for the fast target and for prompts, and a second for the pauses.
        return 1.2 * clients * plan.tokens / rate + 1

    while plan.tokens > plan.least and sum(map(seconds, plan.clients)) > plan.budget_s:
        plan = dataclasses.replace(plan, tokens=max(plan.least, plan.tokens // 2))
    share = plan.budget_s / len(plan.clients)
    return plan, {n: max(1, min(plan.rounds, int(share / seconds(n)))) for n in plan.clients}


def _cases(rounds: dict[int, int]) -> Iterator[tuple[int, int]]:
    for clients, count in rounds.items():
        for number in range(count):
            yield clients, number


def jobs_of(plan: Plan, clients: int, number: int) -> list[Job]:
    """The prompts of one round: one for each client, the same for every target, never asked before."""
    return prompts.make(clients, plan.tokens, seed=SEED, first=1000 * clients + 1000 * 300 * number)


def _warm(server: Running, plan: Plan, reads: dict[int, int]) -> float:
    """Two answers that are thrown away; tokens/s of the second. Raises EdgeError where they are not whole,

    or where the prompt has another number of tokens than `reads` says another target counted.
    """
    name = server.target.name
    for job in prompts.make(2, WARM_TOKENS, seed=SEED + 1):
        sample = asyncio.run(ask(server.url, server.target.dialect, job))
        if sample.state != "ok":
            why = sample.error or f"{sample.completion_tokens} tokens instead of {sample.wanted}"
            raise EdgeError(
                f"the server '{name}' did not give a whole answer: {why}",
                f"its last words:\n    {server.log_tail()}",
            )
        counted = sample.prompt_tokens or 0
        if reads.setdefault(job.index, counted) != counted:
            raise EdgeError(
                f"'{name}' reads a prompt as {counted} tokens, the other server as {reads[job.index]}: "
                "they would not do the same work",
                "the tokenizer was changed by the export; export the model again",
            )
    return token_rate([sample])


def _about(server: Running) -> dict[str, Any]:
    _, body = asyncio.run(get(server.url, server.target.about))
    said = json.loads(body)
    assert isinstance(said, dict)
    return said


def _round(
    part: Measured, server: Running, other: Running | None, plan: Plan, clients: int, number: int
) -> None:
    jobs = jobs_of(plan, clients, number)

    async def drive() -> tuple[list[Sample], HealthProbe]:
        async with HealthProbe(server.url) as probe:
            return await closed_loop(server.url, server.target.dialect, jobs, clients), probe

    time.sleep(PAUSE_S)
    used, began = tree_cpu(other.pid) if other else 0.0, time.perf_counter()
    samples, probe = asyncio.run(drive())
    seconds = time.perf_counter() - began
    idle = (tree_cpu(other.pid) - used) / seconds if other else 0.0
    part.rounds.setdefault(clients, []).append(Round(samples, probe.seconds, probe.failures, idle))


def _memory(part: Measured, server: Running, since: float) -> None:
    part.memory_peak, part.memory_steady = server.memory.peak, server.memory.steady(since)
