"""`edge bench RUN`: the tutorial's server and ours, side by side, on the same model; and others, if asked.

All servers are started, and one of them works at a time: baseline, edge, baseline, edge ..., with the same
prompts and the same forced number of greedy tokens. `/health` is asked all the while. Where the memory does
not hold all, they are started in turn. Nothing is compared that did different work.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import html, peers, prompts, report, roofline, sweep
from bench.bare import counts
from bench.load import HealthProbe, Job, ask, closed_loop, get
from bench.metrics import Sample, token_rate
from bench.probe import noise, tree_cpu
from bench.targets import Running, Target, baseline, ours, ours_onnx, started
from edge import artefact, hardware, manifest
from edge.errors import EdgeError, InputError, UsageError
from edge.gguf_header import GGUFHeader

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
    workloads: tuple[str, ...] = ("mixed",)
    targets: tuple[str, ...] = ("baseline", "edge")
    rounds: int = 5
    budget_s: float = 100.0
    sweep: bool = False


QUICK = Plan(tokens=32, rounds=2, budget_s=40.0)
# Tokens a slot must hold: the longest prompt of the workloads, a conversation, and the answer.
PROMPT_ROOM = 1536
Case = tuple[str, int]


@dataclass
class Round:
    """One pass of one target. idle: the share of a processor that the other servers used meanwhile.

    cpu: processor seconds of the target's own tree.
    """

    samples: list[Sample]
    health: list[float]
    health_failures: int
    idle: float
    cpu: float = 0.0


@dataclass
class Measured:
    """One target's part. rounds: by workload and number of clients, in order."""

    target: Target
    load_s: float = 0.0
    memory_peak: int = 0
    memory_steady: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    rounds: dict[Case, list[Round]] = field(default_factory=dict)


def main(argv: list[str]) -> int:
    if argv[:1] == ["compare"]:
        from bench import compare

        return compare.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="edge bench",
        description="Measure RUN against the slow baseline. `edge bench compare A.json B.json`: two reports.",
    )
    parser.add_argument("run", type=Path, help="a run folder with merged/ and gguf/")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds: under a minute or two")
    parser.add_argument("--tokens", type=int, help="output tokens of every answer")
    parser.add_argument("--clients", help="numbers of clients, such as 1,8")
    parser.add_argument("--workloads", help=f"some of {','.join(prompts.WORKLOADS)} (default: mixed)")
    parser.add_argument("--targets", help=f"some of {','.join(TARGETS)} (default: baseline,edge)")
    parser.add_argument("--sweep", action="store_true", help="how many requests a second each target stands")
    parser.add_argument("--budget", type=float, help="seconds that the rounds may take")
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
        workloads=_names(args.workloads, prompts.WORKLOADS, "--workloads", base.workloads),
        targets=_names(args.targets, TARGETS, "--targets", base.targets),
        budget_s=base.budget_s if args.budget is None else args.budget,
        sweep=args.sweep,
    )
    with stopped_by_signals():
        made = run(args.run, plan, out=args.out, command="edge bench " + shlex.join(argv))
    sys.stdout.write(json.dumps(report.headline(made), ensure_ascii=False) + "\n")
    return 0


def _names(
    given: str | None, known: Mapping[str, object], option: str, default: tuple[str, ...]
) -> tuple[str, ...]:
    if given is None:
        return default
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"{option}: '{name}' is not known", f"known are {', '.join(known)}")
    return names


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
    """Measure the run, show the table, write report.json, .md and .html to `out`; returns the report.

    Raises InputError where the run lacks a part or its GGUF is not of its merged model, EdgeError where a
    server does not start or two of them read different prompts.
    """
    began = time.perf_counter()
    found = artefact.resolve(folder, "llamacpp")
    assert isinstance(found.header, GGUFHeader)
    for stage in ("gguf", "onnx") if "edge-onnx" in plan.targets else ("gguf",):
        check_same_model(folder, stage)
    out = out or folder
    console = Console(stderr=True)
    with console.status("listening how quiet the machine is, and how fast its memory"):
        before = noise()
        threads = hardware.cpu_threads()
        memory = roofline.bandwidth(found.header.weights_bytes, threads)
    targets = [TARGETS[name](folder, found.path, plan) for name in plan.targets]
    need = sum(need_bytes(folder, found, name) for name in plan.targets) + 2**30
    together = need < hardware.memory().available
    with console.status("") as status:
        say = status.update if console.is_terminal else console.print
        measured, kept = measure(targets, plan, out / "bench", together=together, say=say)
    if kept.sweep:
        sweeps = {
            part.target.name: sweep.sweep(
                part.target,
                out / "bench" / f"{part.target.name}-sweep.log",
                tokens=kept.tokens,
                start=sweep.start(part.rounds),
            )
            for part in measured
        }
    else:
        sweeps = {}
    made = report.build(
        measured,
        plan=kept,
        asked_tokens=plan.tokens,
        command=command,
        model=describe(folder, found),
        noise=(before, noise()),
        memory=memory,
        header=found.header,
        sweeps=sweeps,
        together=together,
        seconds=time.perf_counter() - began,
    )
    report.write(made, html.page(made), out)
    report.show(made, Console())
    return made


# Each makes a target over (the run folder, its GGUF, the plan); the first one named is what others are
# compared with.
TARGETS: dict[str, Callable[[Path, Path, Plan], Target]] = {
    "baseline": lambda folder, file, plan: baseline(folder / "merged", "float32"),
    "baseline-bf16": lambda folder, file, plan: baseline(folder / "merged", "bfloat16"),
    "edge": lambda folder, file, plan: ours(folder, "--backend", "llamacpp"),
    "edge-onnx": lambda folder, file, plan: ours_onnx(folder),
    "llama-server": lambda folder, file, plan: peers.llama_server(
        file,
        slots=max(plan.clients),
        context=PROMPT_ROOM + plan.tokens,
        threads=hardware.cpu_threads(),
        flash_attention=False,
    ),
    "xllamacpp": lambda folder, file, plan: peers.xllamacpp(
        file,
        slots=max(plan.clients),
        context=PROMPT_ROOM + plan.tokens,
        threads=hardware.cpu_threads(),
    ),
    "llama_cpp.server": lambda folder, file, plan: peers.llama_cpp_server(
        file, context=PROMPT_ROOM + plan.tokens, threads=hardware.cpu_threads()
    ),
}


def check_same_model(folder: Path, stage: str = "gguf") -> None:
    """Raise InputError unless RUN/merged is there and the stage's folder says that it was made from it."""
    merged = manifest.read(folder / "merged")
    parents = manifest.read(folder / stage).parents
    if merged.digest not in [parent["digest"] for parent in parents]:
        raise InputError(
            f"{folder / stage} was not made from {folder / 'merged'}: the two would not be the same model",
            f"edge export {stage} {shlex.quote(str(folder))} --overwrite",
        )


def need_bytes(folder: Path, found: artefact.Artefact, name: str) -> int:
    """Memory that a target will take, from its files: the baseline's 16-bit weights in its dtype, and torch;

    twice the GGUF's weights for the others, cache and buffers included.
    """
    if not name.startswith("baseline"):
        return 2 * found.header.weights_bytes
    weights = sum(file.stat().st_size for file in (folder / "merged").glob("*.safetensors"))
    return weights * (1 if name == "baseline-bf16" else 2) + 2**30


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
    targets: Sequence[Target], plan: Plan, logs: Path, *, together: bool, say: Any = lambda text: None
) -> tuple[list[Measured], Plan]:
    """Start, warm and drive the targets; what was measured, in that order, and the plan as kept.

    together: all run at once and rounds alternate; otherwise one after the other. The speed of the slowest
    that is known when the first round begins decides what fits into the budget (see `schedule`). Raises what
    `started` raises, and EdgeError where two targets count a prompt's tokens differently.
    """
    measured = [Measured(target) for target in targets]
    reads: dict[int, int] = {}
    rounds: dict[Case, int] = {}
    rates: list[float] = []

    def open_(part: Measured, stack: contextlib.ExitStack) -> Running:
        say(f"starting {part.target.name}")
        server = stack.enter_context(started(part.target, logs / f"{part.target.name}.log"))
        part.load_s = server.load_s
        part.about = _about(server)
        say(f"warming {part.target.name}")
        rates.append(_warm(server, plan, reads))
        return server

    if together:
        with contextlib.ExitStack() as stack:
            running = [open_(part, stack) for part in measured]
            plan, rounds = schedule(plan, rates)
            since = time.perf_counter()
            for case, number in _cases(rounds):
                for part, server in zip(measured, running, strict=True):
                    say(f"{part.target.name}: {_said(case)}, round {number + 1} of {rounds[case]}")
                    others = [s for s in running if s is not server]
                    _round(part, server, others, plan, case, number)
            for part, server in zip(measured, running, strict=True):
                _memory(part, server, since)
        return measured, plan
    for part in measured:
        with contextlib.ExitStack() as stack:
            server = open_(part, stack)
            if not rounds:
                plan, rounds = schedule(plan, [rates[0]] * len(measured))
            since = time.perf_counter()
            for case, number in _cases(rounds):
                say(f"{part.target.name}: {_said(case)}, round {number + 1}")
                _round(part, server, [], plan, case, number)
            _memory(part, server, since)
    return measured, plan


def _said(case: Case) -> str:
    return f"{case[0]}, {case[1]} at once"


def schedule(plan: Plan, rates: Sequence[float]) -> tuple[Plan, dict[Case, int]]:
    """The plan, with shorter answers if need be, and the rounds for each case; at least one.

    rates: tokens/s of each target for one answer; none is taken to be faster with several at once.
    """
    per_token = sum(1.0 / rate for rate in rates)

    def seconds(clients: int) -> float:
        # A fifth more for prompts, and a second for the pauses.
        return 1.2 * clients * plan.tokens * per_token + 1

    def whole() -> float:
        return len(plan.workloads) * sum(map(seconds, plan.clients))

    while plan.tokens > plan.least and whole() > plan.budget_s:
        plan = dataclasses.replace(plan, tokens=max(plan.least, plan.tokens // 2))
    share = plan.budget_s / (len(plan.clients) * len(plan.workloads))
    return plan, {
        (name, n): max(1, min(plan.rounds, int(share / seconds(n))))
        for name in plan.workloads
        for n in plan.clients
    }


def _cases(rounds: dict[Case, int]) -> Iterator[tuple[Case, int]]:
    for case, count in rounds.items():
        for number in range(count):
            yield case, number


def jobs_of(plan: Plan, case: Case, number: int) -> list[Job]:
    """The prompts of one round: the same for every target, never asked before."""
    name, clients = case
    workload = prompts.WORKLOADS[name]
    return workload.jobs(clients, plan.tokens, seed=SEED, first=1000 * clients + 1000 * 300 * number)


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
    part: Measured, server: Running, others: Sequence[Running], plan: Plan, case: Case, number: int
) -> None:
    jobs = jobs_of(plan, case, number)

    async def drive() -> tuple[list[Sample], HealthProbe]:
        async with HealthProbe(server.url, server.target.health) as probe:
            return await closed_loop(server.url, server.target.dialect, jobs, case[1]), probe

    def others_cpu() -> float:
        return sum(tree_cpu(other.pid) for other in others)

    time.sleep(PAUSE_S)
    used, own, began = others_cpu(), tree_cpu(server.pid), time.perf_counter()
    samples, probe = asyncio.run(drive())
    seconds = time.perf_counter() - began
    own, idle = tree_cpu(server.pid) - own, (others_cpu() - used) / seconds
    part.rounds.setdefault(case, []).append(Round(samples, probe.seconds, probe.failures, idle, own))


def _memory(part: Measured, server: Running, since: float) -> None:
    part.memory_peak, part.memory_steady = server.memory.peak, server.memory.steady(since)
