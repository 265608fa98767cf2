"""The engine's figures: `python -m bench.engines.acceptance MODEL.gguf`, one table, one run, interleaved.

Against the bare llama.cpp loop (the roof) and against llama.cpp's own server over the same file, built with
the same flags, with the same threads and flash attention; then what only ours has to show: warm prefixes,
running streams beside a long prompt, prompt lookup, cancellation, memory over many requests. Speculation is
off wherever ours is compared with others. The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.engines.bare_llamacpp import Bare, Setting, counts
from bench.measure import workloads
from bench.measure.load import Job, Ours, ask, closed_loop, get
from bench.measure.metrics import Sample, itl, median, percentile, ratio, token_rate, ttft
from bench.measure.process_probe import noise
from bench.servers.reference_servers import llama_cpp_server, llama_server, xllamacpp
from bench.servers.target import Running, ours, started
from edge.artefact import find
from edge.artefact.gguf_shards import read_whole
from edge.console import guarded
from edge.errors import EdgeError
from edge.machine import hardware

TOKENS = 64
CONTEXT = 512
LONG_CONTEXT = 4096
PAUSE_S = 0.3
# Bytes of a file between the two sizes of model that the goals are for, 135M and 1.5B.
_LARGE = 400_000_000
_LOOKUP_TEXT = (
    "The tide comes in twice a day. Copper turns green with age. The library opens at nine. "
    "Fresh bread should cool for an hour before it is cut. "
)


@dataclasses.dataclass
class Row:
    """One figure: what it is, its value as shown, the goal as shown, and whether it was reached."""

    what: str
    value: str
    goal: str
    reached: bool | None = None


@dataclasses.dataclass(frozen=True)
class Tuned(Ours):
    """Our dialect with some fields of the request changed."""

    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def ask(self, job: Job) -> tuple[str, str, Any]:
        method, path, body = super().ask(job)
        return method, path, {**body, **self.changes}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines.acceptance", description=__doc__.splitlines()[0]
    )
    parser.add_argument("path", type=Path, help="a run, a folder with a GGUF, or a .gguf file")
    parser.add_argument("--streams", type=counts, default=[1, 8, 16, 32], help="default: 1,8,16,32")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each comparison")
    parser.add_argument("--threads", type=int, default=hardware.cpu_threads())
    parser.add_argument("--no-peers", action="store_true", help="compare with the bare loop alone")
    parser.add_argument("--requests", type=int, default=1000, help="of the memory test; 0 leaves it out")
    parser.add_argument("--only", choices=["streams", "others", "features"], help="one part of the table")
    args = parser.parse_args(argv)
    found = find.resolve(args.path)
    console = Console(stderr=True)
    before = noise()
    made: list[Row] = []
    data: dict[str, Any] = {"model": found.path.name, "machine": hardware.describe(), "tokens": TOKENS}
    with tempfile.TemporaryDirectory() as logs:
        bench = _Bench(found.path, args.threads, Path(logs), console)
        if args.only in (None, "streams"):
            made += bench.streams(args.streams, args.rounds, peer=not args.no_peers, data=data)
        if args.only in (None, "others") and not args.no_peers:
            made += bench.others(args.rounds, data)
        if args.only in (None, "features"):
            made += bench.features(args.rounds, args.requests, data)
    table = Table(title=f"{found.path.name}, {args.threads} threads", title_justify="left")
    for heading in ("what", "measured", "goal", ""):
        table.add_column(heading)
    for row in made:
        mark = {True: "reached", False: "MISSED", None: ""}[row.reached]
        table.add_row(row.what, row.value, row.goal, mark)
    Console().print(table)
    for said in (before.warning, noise().warning):
        if said:
            console.print(f"warning: {said}: the machine is noisy, ratios are what counts")
    data["rows"] = [dataclasses.asdict(row) for row in made]
    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
    return 0


class _Bench:
    def __init__(self, path: Path, threads: int, logs: Path, console: Console) -> None:
        self._path = path
        self._large = read_whole(path).file_size > _LARGE
        self._threads = threads
        self._logs = logs
        self._console = console
        self._number = 0

    def _tell(self, rows: list[Row]) -> list[Row]:
        """Say at once what is known, so that a later failure does not lose it."""
        for row in rows:
            self._console.print(f"{row.what}: {row.value}", highlight=False)
        return rows

    def _jobs(self, count: int, tokens: int = TOKENS) -> list[Job]:
        """Prompts never asked before in this run."""
        self._number += count
        return workloads.make(count, tokens, seed=7, first=self._number)

    @contextlib.contextmanager
    def _ours(self, *options: str) -> Iterator[Running]:
        target = ours(self._path, "--threads", str(self._threads), *options)
        with started(target, self._logs / "edge.log", watch=False) as server:
            yield server

    # -- against others ----------------------------------------------------------------------------------

    def streams(self, streams: list[int], rounds: int, *, peer: bool, data: dict[str, Any]) -> list[Row]:
        slots = max(streams)
        with contextlib.ExitStack() as stack:
            options = ["--slots", str(slots), "--ctx", str(CONTEXT)]
            server = stack.enter_context(self._ours(*options))
            info = _info(server)
            flash = info["settings"]["flash_attention"] == "on"
            unified = info["settings"]["kv"] == "unified"
            data["settings"] = info["settings"]
            runs: dict[str, Callable[[int], float]] = {"edge": lambda n: self._rate(server, Tuned(), n)}
            bare = Bare(self._path)
            stack.callback(bare.close)
            runs["bare loop"] = lambda n: bare.run(
                Setting(n, n * CONTEXT, self._threads, flash, unified), prompt=100, new=TOKENS - 1
            )["total_tokens_per_s"]
            if peer:
                target = llama_server(
                    self._path, slots=slots, context=CONTEXT, threads=self._threads, flash_attention=flash
                )
                other = stack.enter_context(started(target, self._logs / "peer.log", watch=False))
                runs["llama-server"] = lambda n: self._rate(other, target.dialect, n)
            rates: dict[int, dict[str, list[float]]] = {}
            rows: list[Row] = []
            for run in runs.values():
                run(min(2, slots))
            for n in streams:
                rates[n] = {name: [] for name in runs}
                for turn in range(rounds):
                    for name, run in runs.items():
                        self._console.print(f"{name}: {n} streams, round {turn + 1} of {rounds}")
                        time.sleep(PAUSE_S)
                        rates[n][name].append(run(n))
                rows += self._tell(self._stream_rows(n, rates[n]))
        data["rates"] = rates
        return rows + self._tell(self._growth_rows(rates))

    def _stream_rows(self, n: int, found: dict[str, list[float]]) -> list[Row]:
        rows = []
        mine = found["edge"]
        shown = ", ".join(f"{name} {median(values):.1f}" for name, values in found.items())
        rows.append(Row(f"{n} streams, total tokens/s", shown, ""))
        # The longer a step, the less of it is HTTP.
        alone = 0.95 if self._large else 0.85
        for name, goal in (("bare loop", alone if n == 1 else None), ("llama-server", 1.0)):
            against = ratio(mine, found[name]) if name in found else None
            if against is not None:
                value = f"{against.value:.2f} x ({against.low:.2f} to {against.high:.2f})"
                reached = None if goal is None else against.value >= goal
                rows.append(Row(f"  against {name}", value, f"{goal:.2f} x" if goal else "", reached))
        return rows

    def _growth_rows(self, rates: dict[int, dict[str, list[float]]]) -> list[Row]:
        rows = []
        if 8 in rates:
            base = median(rates[8]["edge"]) or 0.0
            for n in sorted(m for m in rates if m > 8):
                value = (median(rates[n]["edge"]) or 0.0) / base
                rows.append(Row(f"{n} streams against 8", f"{value:.2f} x", "not lower", value >= 0.97))
        return rows

    def others(self, rounds: int, data: dict[str, Any]) -> list[Row]:
        """Eight streams against the two servers that come as Python packages."""
        rows = []
        data["others"] = {}
        for goal, target in (
            (1.5, xllamacpp(self._path, slots=8, context=CONTEXT, threads=self._threads)),
            (6.0, llama_cpp_server(self._path, context=CONTEXT, threads=self._threads)),
        ):
            rates: dict[str, list[float]] = {"edge": [], target.name: []}
            with (
                self._ours("--slots", "8", "--ctx", str(CONTEXT)) as server,
                started(target, self._logs / "other.log", watch=False) as other,
            ):
                for turn in range(rounds + 1):
                    self._console.print(f"edge and {target.name}: 8 streams, round {turn} of {rounds}")
                    for name, running, dialect in (
                        ("edge", server, Tuned()),
                        (target.name, other, target.dialect),
                    ):
                        time.sleep(PAUSE_S)
                        rate = self._rate(running, dialect, 8)
                        # The first round warms both.
                        rates[name] += [rate] if turn else []
            data["others"][target.name] = rates
            found = ratio(rates["edge"], rates[target.name])
            assert found is not None
            shown = ", ".join(f"{name} {median(values):.1f}" for name, values in rates.items())
            value = f"{found.value:.2f} x ({found.low:.2f} to {found.high:.2f}; {shown} tok/s)"
            row = Row(f"8 streams against {target.name}", value, f"{goal:g} x", found.value >= goal)
            rows += self._tell([row])
        return rows

    def _rate(self, server: Running, dialect: Any, streams: int) -> float:
        samples = asyncio.run(closed_loop(server.url, dialect, self._jobs(streams), streams))
        bad = [s for s in samples if s.state != "ok"]
        if bad:
            raise EdgeError(
                f"{server.target.name} gave {len(bad)} answers that are not whole: "
                f"{bad[0].error or bad[0].completion_tokens}",
                server.log_tail(),
            )
        return token_rate(samples)

    # -- ours alone --------------------------------------------------------------------------------------

    def features(self, rounds: int, requests: int, data: dict[str, Any]) -> list[Row]:
        context = min(LONG_CONTEXT, find.resolve(self._path).header.context_length)
        with self._ours("--ctx", str(context)) as server:
            asyncio.run(closed_loop(server.url, Tuned(), self._jobs(2), 2))
            parts: list[Callable[[], list[Row]]] = [
                lambda: [self._prefix(server, rounds)],
                lambda: [self._gap(server, context)],
                lambda: [self._overhead(server)],
                lambda: self._lookup(server, rounds),
                lambda: self._cancel(server, rounds),
            ]
            if requests:
                parts.append(lambda: [self._memory(server, requests)])
            return [row for part in parts for row in self._tell(part())]

    def _prefix(self, server: Running, rounds: int) -> Row:
        cold, warm = [], []
        for turn in range(rounds):
            head = f"{turn}{time.time_ns()} " + self._text(1000)
            for question, times in (("first", cold), ("second", warm)):
                job = Job(f"{head}\nThe {question} question", 0, 2)
                sample = asyncio.run(ask(server.url, Tuned({"cache_prompt": True}), job))
                times.append(_whole(sample, server)[0])
        found = ratio(warm, cold)
        assert found is not None
        value = f"{found.value:.1%} ({median(cold):.2f} s to {median(warm):.3f} s)"
        return Row("1000-token prefix: warm TTFT of cold", value, "under 8 %", found.value < 0.08)

    def _text(self, tokens: int) -> str:
        """About `tokens` tokens that no prompt before had."""
        return " ".join(job.prompt for job in self._jobs(max(1, tokens // 85)))

    def _gap(self, server: Running, context: int) -> Row:
        """Between texts of running streams, in English: a Chinese character is several of a small
        vocabulary's tokens, and half of one is never sent.
        """
        long = min(2000, context - 300)
        jobs = [job for job in self._jobs(40, tokens=context // 4) if job.prompt.isascii()]

        async def run() -> tuple[list[float], list[float], float]:
            streams = [asyncio.create_task(ask(server.url, Tuned(), job)) for job in jobs[:4]]
            await asyncio.sleep(4.0)
            began = time.perf_counter()
            sample = await ask(server.url, Tuned(), Job(self._text(long), 0, 2))
            first = began + _whole(sample, server)[0]
            rest = await asyncio.gather(*streams)
            quiet, beside = [], []
            for stream in rest:
                if not stream.text.isascii():
                    continue
                for (at, _), gap in zip(stream.events[1:], itl(stream), strict=True):
                    if stream.events[0][0] + 1.0 < at < began:
                        quiet.append(gap)
                    elif began < at < first:
                        beside.append(gap)
            return quiet, beside, first - began

        quiet, beside, took = asyncio.run(run())
        if not quiet or not beside:
            raise EdgeError("no stream of English text ran beside the long prompt", "run it again")
        p95, usual = percentile(beside, 95) or 0.0, percentile(quiet, 95) or 1.0
        value = f"{p95 / usual:.2f} x ({usual * 1e3:.0f} to {p95 * 1e3:.0f} ms; read in {took:.1f} s)"
        goal = "under 2 x the quiet gap"
        return Row(f"p95 gap of 4 streams beside a {long}-token prompt", value, goal, p95 < 2 * usual)

    def _overhead(self, server: Running) -> Row:
        """What the engine's thread does beside the model's steps, while 8 clients take tokens over HTTP."""

        async def run() -> tuple[float, float, int]:
            jobs = self._jobs(8, tokens=96)
            streams = [asyncio.create_task(ask(server.url, Tuned(), job)) for job in jobs]
            seen: list[dict[str, Any]] = []
            while not any(stream.done() for stream in streams):
                state = await _state(server)
                if not seen or state["steps"] > seen[-1]["steps"]:
                    seen.append(state)
                await asyncio.sleep(0.1)
            for stream in streams:
                _whole(await stream, server)
            # Between these all eight were decoding, and nothing else was.
            pairs = [
                (b["up_s"] - a["up_s"], b["step_s"] - a["step_s"], b["steps"] - a["steps"])
                for a, b in itertools.pairwise(seen)
                if b["step_tokens"] - a["step_tokens"] == 8 * (b["steps"] - a["steps"])
            ]
            return sum(p[0] for p in pairs), sum(p[1] for p in pairs), sum(p[2] for p in pairs)

        up, inside, steps = asyncio.run(run())
        share = (up - inside) / inside
        value = (
            f"{share:.2%} ({(up - inside) / steps * 1e3:.2f} of {inside / steps * 1e3:.1f} ms, {steps} steps)"
        )
        return Row("engine beside the model's step, 8 streams", value, "under 3 %", share < 0.03)

    def _lookup(self, server: Running, rounds: int) -> list[Row]:
        rows = []
        free = {"temperature": 0.8, "top_p": 0.95, "seed": 3}
        for name, make, changes, goal in (
            ("repetitive text", lambda: f"{time.time_ns()} " + _LOOKUP_TEXT * 6, {}, 2.0),
            ("free text", lambda: self._jobs(1)[0].prompt, free, 0.97),
        ):
            rates: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(rounds):
                text = make()
                for speculate in (False, True):
                    dialect = Tuned({**changes, "speculate": speculate})
                    sample = asyncio.run(ask(server.url, dialect, Job(text, 0, 96)))
                    first, seconds = _whole(sample, server)
                    rates[speculate].append(95 / (seconds - first))
            found = ratio(rates[True], rates[False])
            assert found is not None
            value = f"{found.value:.2f} x ({found.low:.2f} to {found.high:.2f})"
            rows.append(Row(f"prompt lookup, {name}", value, f"{goal} x", found.value >= goal))
        return rows

    def _cancel(self, server: Running, rounds: int) -> list[Row]:
        async def leave(prompt: str, events: int) -> float:
            host, _, port = server.url.removeprefix("http://").rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            _, path, body = Tuned().ask(Job(prompt, 0, 200))
            text = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
            await _until(server, busy=True)
            await asyncio.sleep(0.5 if events else 0.05)
            writer.transport.abort()
            began = time.perf_counter()
            await _until(server, busy=False)
            return time.perf_counter() - began

        rows = []
        for name, size, events in (("while decoding", 80, 1), ("in prefill", 2000, 0)):
            times = [asyncio.run(leave(self._text(size), events)) for _ in range(rounds)]
            worst = max(times)
            value = f"{median(times) * 1e3:.0f} ms, at most {worst * 1e3:.0f}"
            rows.append(Row(f"cancellation to freed slot, {name}", value, "under 200 ms", worst < 0.2))
        return rows

    def _memory(self, server: Running, requests: int) -> Row:
        family = psutil.Process(server.pid).children(recursive=True)
        worker = next(p for p in family if "edge.engine.worker" in " ".join(p.cmdline()))

        def held() -> int:
            return int(worker.memory_full_info().uss) + int(psutil.Process(server.pid).memory_full_info().uss)

        warm = requests // 4
        asyncio.run(closed_loop(server.url, Tuned(), self._jobs(warm, tokens=4), 16))
        before = held()
        asyncio.run(closed_loop(server.url, Tuned(), self._jobs(requests, tokens=4), 16))
        grown = (held() - before) / 2**20
        value = f"{grown:+.1f} MiB of {before / 2**20:.0f}"
        return Row(f"{requests} requests: growth after warm-up", value, "flat", grown < 8.0)


def _info(server: Running) -> dict[str, Any]:
    return asyncio.run(_state(server))


async def _state(server: Running) -> dict[str, Any]:
    _, body = await get(server.url, "/info")
    said: dict[str, Any] = json.loads(body)
    return said


async def _until(server: Running, *, busy: bool) -> None:
    # Another process changes it: there is nothing to wait on but the next answer.
    while bool((await _state(server))["busy_slots"]) != busy:  # noqa: ASYNC110
        await asyncio.sleep(0.002)


def _whole(sample: Sample, server: Running) -> tuple[float, float]:
    """(TTFT, end to end) of an answer in seconds. Raises EdgeError where it is not whole."""
    first = ttft(sample)
    if sample.state != "ok" or first is None:
        raise EdgeError(f"an answer is not whole: {sample.error or sample.finish}", server.log_tail())
    return first, sample.end - sample.start


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
