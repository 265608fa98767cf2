"""The measured rounds: targets are started, warmed and driven in turn, with the same work; then stopped.

A round is one pass of one target over one case (a workload and a number of clients). Where the memory holds
all servers, rounds alternate: A B A B. `/health` is asked all the while.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.measure import workloads as prompts
from bench.measure.load import HealthProbe, ask, closed_loop, get_json
from bench.measure.metrics import Sample, e2e, token_rate
from bench.measure.process_probe import tree_cpu
from bench.measure.progress import View
from bench.measure.roofline import Bandwidth, reading
from bench.measure.workloads import Plan
from bench.servers.target import Running, Target, started
from edge.errors import EdgeError
from edge.machine import hardware

SEED = 1
WARM_TOKENS = 16
PAUSE_S = 0.3
# The last of many clients waits long for a server that answers one after the other.
ANSWER_LIMIT_S = 3600.0
Case = tuple[str, int]


@dataclass
class Round:
    """One pass of one target. idle: the share of a processor that the other servers used meanwhile.

    cpu: processor seconds of the target's own tree. memory: the better of two readings, right before and
    right after; None where it says nothing.
    """

    samples: list[Sample]
    health: list[float]
    health_failures: int
    idle: float
    cpu: float = 0.0
    memory: Bandwidth | None = None


@dataclass
class Measured:
    """One target's part. rounds: by workload and number of clients, in order.

    answers_s, load_s: seconds until its port answered anything, and until it was ready. Memory in bytes; that
    of the GPUs is what they held more, once it was warm, than before it started. unforced: why its answers
    may not have the tokens that were asked for, "" where they must.
    """

    target: Target
    answers_s: float = 0.0
    load_s: float = 0.0
    memory_peak: int = 0
    memory_steady: int = 0
    gpu_memory: int | None = None
    unforced: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    rounds: dict[Case, list[Round]] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether the server says that its model lies on a GPU."""
        return str(self.about.get("device", "")).startswith("cuda")


def measure(
    targets: Sequence[Target],
    plan: Plan,
    logs: Path,
    *,
    together: bool,
    view: View,
    probed: Mapping[str, int],
) -> tuple[list[Measured], Plan]:
    """Start, warm and drive the targets; what was measured, in that order, and the plan as kept.

    together: all run at once and rounds alternate; otherwise one after the other. The speed of the slowest
    that is known when the first round begins decides what fits into the budget (see `schedule`). probed:
    bytes of memory to read beside a round of one client, by target. Raises what `started` raises, and
    EdgeError where two targets count a prompt's tokens differently.
    """
    return _Rounds(plan, logs, view, probed).run(targets, together)


class _Rounds:
    """What the rounds of one measurement share."""

    def __init__(self, plan: Plan, logs: Path, view: View, probed: Mapping[str, int]) -> None:
        self.plan, self.logs, self.view, self.probed = plan, logs, view, probed
        self.reads: dict[int, int] = {}
        self.rates: list[float] = []
        self.rounds: dict[Case, int] = {}

    def run(self, targets: Sequence[Target], together: bool) -> tuple[list[Measured], Plan]:
        measured = [Measured(target) for target in targets]
        for group in [measured] if together else [[part] for part in measured]:
            with contextlib.ExitStack() as stack:
                running = [self.open(part, stack) for part in group]
                if not self.rounds:
                    self.settle(measured, self.rates if together else self.rates * len(measured))
                since = time.perf_counter()
                for case, number in ((case, n) for case, count in self.rounds.items() for n in range(count)):
                    for part, server in zip(group, running, strict=True):
                        others = [other for other in running if other is not server]
                        self.round(part, server, others, case, number)
                for part, server in zip(group, running, strict=True):
                    part.memory_peak, part.memory_steady = server.memory.peak, server.memory.steady(since)
        return measured, self.plan

    def open(self, part: Measured, stack: contextlib.ExitStack) -> Running:
        """Start a target, and warm it."""
        name = part.target.name
        self.view.say(f"starting {name}")
        before = _gpu_memory()
        server = stack.enter_context(started(part.target, self.logs / f"{name}.log"))
        if not part.target.url:
            part.load_s, part.answers_s = server.load_s, server.answers_s
        part.about = asyncio.run(get_json(server.url, part.target.about, key=part.target.dialect.key))
        self.view.say(f"warming {name}")
        self.rates.append(warm(part, server, self.reads))
        # A server that ran before has its share in both.
        if before is not None and not part.target.url:
            part.gpu_memory = max((_gpu_memory() or 0) - before, 0)
        return server

    def settle(self, measured: Sequence[Measured], rates: Sequence[float]) -> None:
        """Decide about the rounds, by tokens/s of each target."""
        self.plan, self.rounds = schedule(self.plan, rates)
        names = [part.target.name for part in measured]
        seconds = {
            (name, case): 1.2 * case[1] * self.plan.tokens / rate
            for name, rate in zip(names, rates, strict=True)
            for case in self.rounds
        }
        self.view.expect(names, self.rounds, seconds)

    def round(
        self, part: Measured, server: Running, others: Sequence[Running], case: Case, number: int
    ) -> None:
        name, clients = case
        target = part.target
        # The same prompts for every target, never asked before.
        first = 1000 * clients + 1000 * 300 * number
        jobs = prompts.WORKLOADS[name].jobs(clients, self.plan.tokens, seed=SEED, first=first)

        async def drive() -> tuple[list[Sample], HealthProbe]:
            async with HealthProbe(server.url, target.health, key=target.dialect.key) as probe:
                load = closed_loop(
                    server.url, target.dialect, jobs, clients, limit=ANSWER_LIMIT_S, seen=self.view.seen
                )
                return await load, probe

        def used() -> tuple[float, float]:
            return tree_cpu(server.pid), sum(tree_cpu(other.pid) for other in others)

        before = self.read(part, case)
        time.sleep(PAUSE_S)
        cpu, idle = used()
        began = time.perf_counter()
        self.view.begin(target.name, case)
        samples, probe = asyncio.run(drive())
        seconds = time.perf_counter() - began
        cpu, idle = (after - earlier for after, earlier in zip(used(), (cpu, idle), strict=True))
        after = self.read(part, case)
        memory = max(before, after) if before and after else None
        part.rounds.setdefault(case, []).append(
            Round(samples, probe.seconds, probe.failures, idle / seconds, cpu, memory)
        )
        self.view.end(token_rate(samples))

    def read(self, part: Measured, case: Case) -> Bandwidth | None:
        """How fast the processor's memory is now, where a round tells of decoding one stream from it."""
        size = self.probed.get(part.target.name, 0)
        wanted = case[1] == 1 and size and not part.on_gpu
        return reading(size, hardware.cpu_threads()) if wanted else None


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
        plan = replace(plan, tokens=max(plan.least, plan.tokens // 2))
    share = plan.budget_s / (len(plan.clients) * len(plan.workloads))
    return plan, {
        (name, n): max(1, min(plan.rounds, int(share / seconds(n))))
        for name in plan.workloads
        for n in plan.clients
    }


def warm(part: Measured, server: Running, reads: dict[int, int]) -> float:
    """Two answers that are thrown away; tokens/s of the second. reads: each prompt's tokens, as the first
    target counted them.

    A server that somebody else started and that does other work is noted as such in `part`; for any other,
    EdgeError is raised where an answer is not whole or a prompt has another number of tokens.
    """
    target = part.target
    part.unforced = "" if target.forced else "it cannot be made to go on after an end token"
    rate = 1.0
    for job in prompts.make(2, WARM_TOKENS, seed=SEED + 1):
        sample = asyncio.run(ask(server.url, target.dialect, job))
        if sample.error or (sample.state != "ok" and not target.url):
            why = sample.error or f"{sample.completion_tokens} tokens instead of {sample.wanted}"
            raise EdgeError(
                f"the server '{target.name}' did not give a whole answer: {why}",
                f"its last words:\n    {server.log_tail()}",
            )
        if sample.state != "ok":
            part.unforced = f"it gave {sample.completion_tokens} of {sample.wanted} tokens"
        counted = sample.prompt_tokens or 0
        if reads.setdefault(job.index, counted) != counted and not target.url:
            raise EdgeError(
                f"'{target.name}' reads a prompt as {counted} tokens, the other server as "
                f"{reads[job.index]}: they would not do the same work",
                "the tokenizer was changed by the export; export the model again",
            )
        rate = (sample.completion_tokens or 1) / e2e(sample)
    return rate


def _gpu_memory() -> int | None:
    """Bytes in use on all GPUs; None without one."""
    gpus = hardware.gpus()
    return sum(gpu.memory_total - gpu.memory_free for gpu in gpus) if gpus else None
