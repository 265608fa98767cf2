"""How far a number of replicas carries: measured step times, a simulation over them, a run to check it by.

    python -m bench.scaling measure URL > measured.json      # of one `edge serve` that nobody else asks
    python -m bench.scaling check measured.json URL URL      # the simulation beside a run over these servers
    python -m bench.scaling check measured.json URL --replicas 2   # beside a run over replicas behind a URL
    python -m bench.scaling table docs/reports/scaling.json  # the table of docs/scaling.md

The simulation knows no model: a replica is slots, the time of a step by its rows, and the engine's own policy
for prompts (edge.engine.prefill_budget) under simulated time.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.measure.load import Ours, ask, get_json
from bench.measure.metrics import Sample, request_rate, tpot, ttft
from bench.measure.workloads import Job
from edge.artefact import json_file
from edge.console import guarded
from edge.engine.prefill_budget import Newcomers, PrefillBudget
from edge.errors import EdgeError, InputError
from edge.loading.load_plan import BATCH

# The simulation is good where it is this near to a run, in requests/s and in the median TTFT.
NEAR = 0.15
# Tokens of an answer, and words of a short and a long prompt, while step times are measured.
_ANSWER, _WORDS = 48, (8, 64)


@dataclass(frozen=True)
class Measured:
    """One replica. step_s: [streams, seconds between their tokens], ascending.

    A lone prompt's first token comes after first_s + prompt_token_s for each of its tokens. batch: the most
    tokens of a step.
    """

    slots: int
    batch: int
    step_s: list[list[float]]
    prompt_token_s: float
    first_s: float

    def step(self, decoding: int, prefill: int) -> float:
        """Seconds of a step of `decoding` streams and `prefill` prompt tokens; interpolated between rows."""
        rows, seconds = zip(*self.step_s, strict=True)
        return float(np.interp(max(1, decoding), rows, seconds)) + prefill * self.prompt_token_s

    @property
    def overhead_s(self) -> float:
        """What a request takes before and after the engine's steps."""
        return max(0.0, self.first_s - self.step(1, 0))


@dataclass(slots=True, eq=False)
class Request:
    """prompt, answer: tokens. conversation: whose prompt begins with what came before. start, first, end: s.

    left: prompt tokens to read; made: tokens of the answer.
    """

    key: int
    prompt: int
    answer: int
    start: float
    conversation: int = -1
    client: int = 0
    left: int = 0
    made: int = 0
    first: float = 0.0
    end: float = 0.0


@dataclass
class Replica:
    """known: how many conversations' prefixes it keeps."""

    measured: Measured
    known: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    busy: bool = False

    def __post_init__(self) -> None:
        self._budget = PrefillBudget(self.measured.batch)
        # As of a server that has run for a while.
        self._budget.learn(0, 64, self.measured.step(0, 64))
        for streams, seconds in self.measured.step_s:
            self._budget.learn(int(streams), 0, seconds)
        self._prefixes: OrderedDict[int, int] = OrderedDict()

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, request: Request) -> None:
        request.left = max(1, request.prompt - self._prefixes.get(request.conversation, 0))
        self.waiting.append(request)

    def step(self) -> tuple[float, list[Request]]:
        """Plan a step as the engine's scheduler does; its seconds, and the requests that get a token."""
        decoding = [request for request in self.running if not request.left]
        free = self.measured.slots - len(self.running)
        new = [one for one in self.running if one.left] + list(itertools.islice(self.waiting, free))
        keys = [one.key for one in new]
        about = (
            Newcomers(len(new), sum(one.left for one in new), min(keys), max(keys)) if new else Newcomers()
        )
        chunk = self._budget.chunk(len(decoding), about)
        room = whole = min(self.measured.batch - len(decoding), chunk)
        gets, prefill = list(decoding), 0
        for request in new:
            # A prompt that the next step would hold whole is not cut, nor one that is a little too long.
            n = request.left if request.left <= room * 1.5 else 0 if request.left <= whole else room
            if room <= 0 or not n:
                break
            if request not in self.running:
                self.running.append(self.waiting.popleft())
            request.left -= n
            room, prefill = room - n, prefill + n
            if not request.left:
                gets.append(request)
        seconds = self.measured.step(len(decoding), prefill)
        self._budget.learn(len(decoding), prefill, seconds)
        return seconds, gets

    def finish(self, request: Request) -> None:
        self.running.remove(request)
        if self.known and request.conversation >= 0:
            self._prefixes[request.conversation] = request.prompt + request.answer
            self._prefixes.move_to_end(request.conversation)
            if len(self._prefixes) > self.known:
                self._prefixes.popitem(last=False)


Route = Callable[[Request, list[Replica]], Replica]


def by_client(request: Request, replicas: list[Replica]) -> Replica:
    """Round robin by the client's number."""
    return replicas[request.client % len(replicas)]


def by_conversation(request: Request, replicas: list[Replica]) -> Replica:
    """The conversation's own replica; while its slots are taken, the one with the least to do."""
    home = replicas[request.conversation % len(replicas)]
    return home if home.load < home.measured.slots else min(replicas, key=lambda one: one.load)


def by_load(request: Request, replicas: list[Replica]) -> Replica:
    return min(replicas, key=lambda one: one.load)


def simulate(
    replicas: list[Replica], requests: Sequence[Request], route: Route, *, clients: int = 0
) -> list[Request]:
    """The requests with the times of their first token and end, in seconds, ordered by their ends.

    clients: so many in a closed loop, each of which sends its next request at the end of its last; 0: each
    request is sent at its `start`.
    """
    upcoming = deque(requests)
    done: list[Request] = []
    order = itertools.count()
    events: list[tuple[float, int, Request | tuple[Replica, list[Request]]]] = []

    def send(request: Request, now: float, client: int) -> None:
        request.start, request.client = now, client
        heapq.heappush(events, (now + request_overhead, next(order), request))

    def run(replica: Replica, now: float) -> None:
        replica.busy = bool(replica.load)
        if replica.busy:
            seconds, gets = replica.step()
            heapq.heappush(events, (now + seconds, next(order), (replica, gets)))

    request_overhead = replicas[0].measured.overhead_s
    for client in range(min(clients, len(upcoming)) if clients else len(upcoming)):
        request = upcoming.popleft()
        send(request, 0.0 if clients else request.start, client)
    while events:
        now, _, event = heapq.heappop(events)
        if isinstance(event, Request):
            replica = route(event, replicas)
            replica.add(event)
            if not replica.busy:
                run(replica, now)
            continue
        replica, gets = event
        for request in gets:
            request.made += 1
            request.first = request.first or now
            if request.made == request.answer:
                request.end = now
                replica.finish(request)
                done.append(request)
                if upcoming and clients:
                    send(upcoming.popleft(), now, request.client)
        run(replica, now)
    return done


def alike(count: int, prompt: int, answer: int, *, rate: float = 0.0, seed: int = 0) -> list[Request]:
    """`count` requests of one size; rate: requests/s of a Poisson process that sends them."""
    draw, now, requests = random.Random(seed), 0.0, []
    for key in range(1, count + 1):
        now += draw.expovariate(rate) if rate else 0.0
        requests.append(Request(key, prompt, answer, now))
    return requests


def figures(done: Sequence[Request]) -> tuple[float, float]:
    """Requests/s from the first start to the last end, and the median TTFT in seconds."""
    wall = max(one.end for one in done) - min(one.start for one in done)
    return len(done) / wall, median(one.first - one.start for one in done)


def _jobs(count: int, words: int, tokens: int, head: str) -> list[Job]:
    return [Job(f"{head}{n} " + "tide " * words, n, tokens) for n in range(count)]


async def _closed(urls: Sequence[str], jobs: Sequence[Job], clients: int) -> list[Sample]:
    """A closed loop in which client n asks the server n modulo their number."""
    waiting, samples = deque(jobs), list[Sample]()

    async def client(number: int) -> None:
        while waiting:
            samples.append(await ask(urls[number % len(urls)], Ours(), waiting.popleft(), client=number))

    await asyncio.gather(*(client(number) for number in range(clients)))
    if wrong := [
        sample.error or "an answer that stopped early" for sample in samples if sample.state != "ok"
    ]:
        raise EdgeError(f"{len(wrong)} of {len(samples)} requests failed: {wrong[0]}")
    return samples


def measure(url: str) -> Measured:
    """What the simulation needs of the server at `url`: a few seconds each for 1, 2, 4... streams."""
    asyncio.run(_closed([url], _jobs(2, _WORDS[1], _ANSWER, "warm"), 1))
    slots, batch = _size(url)
    lone = []
    for words in _WORDS:
        samples = asyncio.run(_closed([url], _jobs(7, words, 2, f"lone {words} "), 1))
        lone.append((samples[0].prompt_tokens or 0, median(ttft(one) or 0.0 for one in samples)))
    (few, early), (many, late) = lone
    each = max(0.0, (late - early) / (many - few))
    steps = []
    for streams in sorted({*(2**n for n in range(8) if 2**n < slots), slots}):
        samples = asyncio.run(_closed([url], _jobs(2 * streams, 2, _ANSWER, f"wide {streams} "), streams))
        steps.append([streams, median(tpot(one) or 0.0 for one in samples)])
    return Measured(slots, batch, steps, each, early - few * each)


def _size(url: str) -> tuple[int, int]:
    """Slots and the most tokens of a step, as /info of the server has them."""
    about = asyncio.run(get_json(url, "/info"))
    return int(about["slots"]), int((about["settings"] or {}).get("batch", BATCH))


def check(
    measured: Measured, urls: Sequence[str], *, replicas: int = 1, per_client: int = 8, words: int = 16
) -> dict[str, Any]:
    """A run over the servers at `urls`, as many clients as they have slots, beside its simulation.

    replicas: behind each URL. Behind one they share the requests by conversation, as Ray's router does; each
    request begins one. Answers have half to one and a half times the usual length, so that they do not all
    begin at once.
    """
    count = len(urls) * replicas
    clients, draw = measured.slots * count, random.Random(0)
    asyncio.run(_closed(urls, _jobs(clients, words, _ANSWER, "warm"), clients))
    lengths = [draw.randint(_ANSWER // 2, 3 * _ANSWER // 2) for _ in range(per_client * clients)]
    jobs = [replace(_jobs(1, words, tokens, f"{n} ")[0], index=n) for n, tokens in enumerate(lengths)]
    samples = asyncio.run(_closed(urls, jobs, clients))
    prompt = int(median(one.prompt_tokens or 0 for one in samples))
    requests = [
        Request(key, prompt, tokens, 0.0, conversation=draw.randrange(count))
        for key, tokens in enumerate(lengths, 1)
    ]
    route = by_client if replicas == 1 else by_conversation
    done = simulate([Replica(measured) for _ in range(count)], requests, route, clients=clients)
    run = request_rate(samples), median(ttft(one) or 0.0 for one in samples)
    rows = {}
    for name, simulated, real in zip(("requests_per_s", "ttft_p50_s"), figures(done), run, strict=True):
        rows[name] = {"simulated": simulated, "run": real, "ratio": simulated / real}
    near = all(abs(row["ratio"] - 1) <= NEAR for row in rows.values())
    return {"replicas": count, "clients": clients, "requests": len(samples), "near": near, **rows}


@dataclass(frozen=True)
class Place:
    """A row of the table. simulated: replicas that are simulated, of `replicas`, which know nothing of one
    another. weights: GB of one; cell: bytes of a token in the KV cache; context: tokens of a slot.
    """

    name: str
    model: str
    replicas: int
    simulated: int
    weights: float
    cell: int
    context: int
    breaks: str
    measured: Measured


def places(file: Path) -> tuple[float, list[Place]]:
    """Seconds of a core that HTTP takes for a token, and the rows, of a JSON file.

    Raises InputError where it lacks a key.
    """
    content = json_file.read(file, required=True)
    try:
        rows = [Place(**row | {"measured": Measured(**row["measured"])}) for row in content["places"]]
        return float(content["http_token_s"]), rows
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: {error}", "see docs/reports/scaling.json for its keys") from error


def row(place: Place, http_token_s: float, prompt: int, answer: int) -> list[str]:
    """Requests/s with all slots taken; TTFT at 80 % of that; memory of a replica; cores for HTTP."""
    slots = place.measured.slots

    def replicas() -> list[Replica]:
        return [Replica(place.measured) for _ in range(place.simulated)]

    clients = slots * place.simulated
    full, _ = figures(simulate(replicas(), alike(5 * clients, prompt, answer), by_client, clients=clients))
    load = alike(max(200, 8 * clients), prompt, answer, rate=0.8 * full)
    waits = [one.first - one.start for one in simulate(replicas(), load, by_load)]
    rate = full * place.replicas / place.simulated
    cache = slots * place.context * place.cell / 1e9
    cores = rate * answer * http_token_s
    quick, slow = np.quantile(waits, [0.5, 0.99])
    return [
        place.name,
        place.model,
        f"{rate:,.2f}" if rate < 10 else f"{rate:,.0f}",
        f"{rate * answer:,.0f}",
        f"{1000 * quick:,.0f} / {1000 * slow:,.0f} ms",
        f"{place.weights:g} + {cache:.1f} GB",
        f"{cores:,.2f}" if cores < 10 else f"{cores:,.0f}",
        place.breaks,
    ]


_HEADINGS = (
    "place", "model", "requests/s", "tokens/s", "TTFT p50 / p99 at 80 %", "weights + KV, each",
    "cores for HTTP", "breaks first",
)  # fmt: skip


def table(file: Path, *, prompt: int = 100, answer: int = 200) -> str:
    """The rows of `file` as Markdown."""
    http_token_s, rows = places(file)
    lines = [_HEADINGS, ["---"] * 2 + ["---:"] * 5 + ["---"]]
    lines += [row(place, http_token_s, prompt, answer) for place in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("measure").add_argument("url")
    for verb in ("check", "table"):
        verbs.add_parser(verb).add_argument("file", type=Path)
    verbs.choices["check"].add_argument("urls", nargs="+")
    verbs.choices["check"].add_argument("--replicas", type=int, default=1, help="behind each URL")
    args = parser.parse_args(argv)
    if args.verb == "table":
        sys.stdout.write(table(args.file))
        return 0
    if args.verb == "measure":
        sys.stdout.write(json.dumps(asdict(measure(args.url)), indent=1) + "\n")
        return 0
    outcome = check(Measured(**json_file.read(args.file, required=True)), args.urls, replicas=args.replicas)
    sys.stdout.write(json.dumps(outcome, indent=1) + "\n")
    return 0 if outcome["near"] else 1


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
