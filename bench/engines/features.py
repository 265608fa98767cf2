"""Rows for what only our server has to show: prefix reuse, running streams beside a long prompt, the engine's
overhead, prompt lookup, cancellation, and memory over many requests.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from bench.engines.race import Row
from bench.engines.sides import new_jobs
from bench.measure.load import Ours, ask, closed_loop, get_json
from bench.measure.metrics import Sample, itl, percentile, ratio, ttft
from bench.measure.workloads import Job
from bench.servers.target import Running
from edge.errors import EdgeError

_LOOKUP_TEXT = (
    "The tide comes in twice a day. Copper turns green with age. The library opens at nine. "
    "Fresh bread should cool for an hour before it is cut. "
)


def rows(server: Running, context: int, *, rounds: int, requests: int) -> Iterator[Row]:
    """All rows of a server whose slots hold `context` tokens. requests: of the memory test; 0 leaves it out.

    Raises EdgeError where an answer is not whole.
    """
    asyncio.run(closed_loop(server.url, Ours(), new_jobs(2, 64), 2))
    yield _prefix(server, rounds)
    yield _gap(server, context)
    yield _overhead(server)
    free = {"temperature": 0.8, "top_p": 0.95, "seed": 3}
    yield _lookup(server, rounds, f"{time.time_ns()} " + _LOOKUP_TEXT * 6, "repetitive text", {}, goal=2.0)
    yield _lookup(server, rounds, new_jobs(1, 64)[0].prompt, "free text", free, goal=0.97)
    yield _cancel(server, rounds, "while decoding", tokens=80, wait=0.5)
    yield _cancel(server, rounds, "in prefill", tokens=2000, wait=0.05)
    if requests:
        yield _memory(server, requests)


def _text(tokens: int) -> str:
    """About `tokens` tokens that no prompt before had."""
    return " ".join(job.prompt for job in new_jobs(max(1, tokens // 85), 1))


def _whole(sample: Sample, server: Running) -> tuple[float, float]:
    """(TTFT, end to end) of an answer in seconds. Raises EdgeError where it is not whole."""
    first = ttft(sample)
    if sample.state != "ok" or first is None:
        raise EdgeError(f"an answer is not whole: {sample.error or sample.finish}", server.log_tail())
    return first, sample.end - sample.start


def _prefix(server: Running, rounds: int) -> Row:
    times: dict[str, list[float]] = {"first": [], "second": []}
    for number in range(rounds):
        head = f"{number}{time.time_ns()} " + _text(1000)
        for question, firsts in times.items():
            job = Job(f"{head}\nThe {question} question", 0, 2)
            sample = asyncio.run(ask(server.url, Ours({"cache_prompt": True}), job))
            firsts.append(_whole(sample, server)[0])
    cold, warm = (statistics.median(firsts) for firsts in times.values())
    pairs = ratio(times["second"], times["first"])
    assert pairs is not None, "there is at least one round"
    measured = f"{pairs.value:.1%} ({cold:.2f} s to {warm:.3f} s)"
    return Row("1000-token prefix: warm TTFT of cold", measured, goal="under 8 %", reached=pairs.value < 0.08)


def _gap(server: Running, context: int) -> Row:
    """The gaps between texts of running streams, in English alone: a Chinese character is several tokens of a
    small vocabulary, and half of one is never sent.
    """
    length = min(2000, context - 300)
    jobs = [job for job in new_jobs(40, context // 4) if job.prompt.isascii()]

    async def run() -> tuple[list[float], list[float], float]:
        streams = [asyncio.create_task(ask(server.url, Ours(), job)) for job in jobs[:4]]
        await asyncio.sleep(4.0)
        began = time.perf_counter()
        sample = await ask(server.url, Ours(), Job(_text(length), 0, 2))
        first = began + _whole(sample, server)[0]
        quiet, beside = [], []
        for stream in await asyncio.gather(*streams):
            if not stream.text.isascii():
                continue
            for (moment, _), gap in zip(stream.events[1:], itl(stream), strict=True):
                if stream.events[0][0] + 1.0 < moment < began:
                    quiet.append(gap)
                elif began < moment < first:
                    beside.append(gap)
        return quiet, beside, first - began

    quiet, beside, seconds = asyncio.run(run())
    if not quiet or not beside:
        raise EdgeError("no stream of English text ran beside the long prompt", "run it again")
    usual, p95 = percentile(quiet, 95) or 1.0, percentile(beside, 95) or 0.0
    return Row(
        f"p95 gap of 4 streams beside a {length}-token prompt",
        f"{p95 / usual:.2f} x ({usual * 1e3:.0f} to {p95 * 1e3:.0f} ms; read in {seconds:.1f} s)",
        goal="under 2 x the quiet gap",
        reached=p95 < 2 * usual,
    )


def long_prompt(server: Running, *, streams: int, tokens: int, rounds: int) -> Row:
    """The first token of a long prompt beside running streams, and the longest gap in their texts then."""

    async def run() -> tuple[list[float], list[float]]:
        running = [asyncio.create_task(ask(server.url, Ours(), job)) for job in new_jobs(streams, 1500)]
        await asyncio.sleep(2.0)
        firsts, windows = list[float](), list[tuple[float, float]]()
        for _ in range(rounds):
            began = time.perf_counter()
            firsts.append(_whole(await ask(server.url, Ours(), Job(_text(tokens), 0, 2)), server)[0])
            windows.append((began, began + firsts[-1]))
            await asyncio.sleep(0.2)
        gaps = dict.fromkeys(windows, 0.0)
        for stream in await asyncio.gather(*running):
            for (moment, _), gap in zip(stream.events[1:], itl(stream), strict=True):
                for window in windows:
                    if moment > window[0] and moment - gap < window[1]:
                        gaps[window] = max(gaps[window], gap)
        return firsts, list(gaps.values())

    firsts, gaps = asyncio.run(run())
    if not all(gaps):
        raise EdgeError(
            "no stream ran beside the long prompt", "run it on a slower model, or with fewer rounds"
        )
    return Row(
        f"first token of a {tokens}-token prompt beside {streams} streams",
        f"{_spread(firsts)}; longest gap of the others {_spread(gaps)}",
        goal="60 ms; 50 ms",
        reached=statistics.median(firsts) <= 0.06 and statistics.median(gaps) <= 0.05,
    )


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = (1e3 * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.0f} ms ({low:.0f} to {high:.0f})"


def _overhead(server: Running) -> Row:
    """What the engine's thread does beside the model's steps, while 8 clients take tokens over HTTP."""

    async def run() -> tuple[float, float, int]:
        streams = [asyncio.create_task(ask(server.url, Ours(), job)) for job in new_jobs(8, 96)]
        states: list[dict[str, Any]] = []
        while not any(stream.done() for stream in streams):
            info = await get_json(server.url, "/info")
            if not states or info["steps"] > states[-1]["steps"]:
                states.append(info)
            await asyncio.sleep(0.1)
        for stream in streams:
            _whole(await stream, server)
        # Between these all eight were decoding, and nothing else was.
        spans = [
            [after[name] - before[name] for name in ("up_s", "step_s", "steps")]
            for before, after in itertools.pairwise(states)
            if after["step_tokens"] - before["step_tokens"] == 8 * (after["steps"] - before["steps"])
        ]
        up, inside, steps = (sum(column) for column in zip(*spans, strict=True))
        return up, inside, int(steps)

    up, inside, steps = asyncio.run(run())
    share = (up - inside) / inside
    each = f"{(up - inside) / steps * 1e3:.2f} of {inside / steps * 1e3:.1f} ms, {steps} steps"
    what = "engine beside the model's step, 8 streams"
    return Row(what, f"{share:.2%} ({each})", goal="under 3 %", reached=share < 0.03)


def _lookup(
    server: Running, rounds: int, text: str, name: str, changes: dict[str, Any], *, goal: float
) -> Row:
    """Decoding with prompt lookup over decoding without it."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for speculate in (False, True):
            dialect = Ours({**changes, "speculate": speculate})
            sample = asyncio.run(ask(server.url, dialect, Job(f"{number} {text}", 0, 96)))
            first, seconds = _whole(sample, server)
            rates[speculate].append(95 / (seconds - first))
    faster = ratio(rates[True], rates[False])
    assert faster is not None, "there is at least one round"
    measured = f"{faster.value:.2f} x ({faster.low:.2f} to {faster.high:.2f})"
    return Row(f"prompt lookup, {name}", measured, goal=f"{goal:g} x", reached=faster.value >= goal)


def _cancel(server: Running, rounds: int, name: str, *, tokens: int, wait: float) -> Row:
    """From a client's leaving to its freed slot. tokens: of the prompt; wait: seconds until it leaves."""

    async def until(*, busy: bool) -> None:
        # Another process changes it: there is nothing to wait on but the next answer.
        while bool((await get_json(server.url, "/info"))["busy_slots"]) != busy:  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    async def leave() -> float:
        asked = asyncio.create_task(ask(server.url, Ours(), Job(_text(tokens), 0, 200)))
        await until(busy=True)
        await asyncio.sleep(wait)
        asked.cancel()
        began = time.perf_counter()
        await until(busy=False)
        return time.perf_counter() - began

    times = [asyncio.run(leave()) for _ in range(rounds)]
    measured = f"{statistics.median(times) * 1e3:.0f} ms, at most {max(times) * 1e3:.0f}"
    what = f"cancellation to freed slot, {name}"
    return Row(what, measured, goal="under 200 ms", reached=max(times) < 0.2)


def _memory(server: Running, requests: int) -> Row:
    family = psutil.Process(server.pid).children(recursive=True)
    worker = next(p for p in family if "edge.engine.worker" in " ".join(p.cmdline()))

    def held() -> int:
        return sum(int(p.memory_full_info().uss) for p in (worker, psutil.Process(server.pid)))

    asyncio.run(closed_loop(server.url, Ours(), new_jobs(requests // 4, 4), 16))
    before = held()
    asyncio.run(closed_loop(server.url, Ours(), new_jobs(requests, 4), 16))
    grown = (held() - before) / 2**20
    measured = f"{grown:+.1f} MiB of {before / 2**20:.0f}"
    return Row(f"{requests} requests: growth after warm-up", measured, goal="flat", reached=grown < 8.0)
