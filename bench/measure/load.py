"""The load generator: N clients in a closed loop, or requests at random times (open loop).

In the closed loop each client sends its next request when its last answer is complete. The time at which each
piece of an answer arrives is kept, so that any figure can be computed afterwards (see bench.measure.metrics).
A probe asks `/health` meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit

from bench.measure.http1 import Events, Lines, ProtocolError, Response, request
from bench.measure.metrics import Sample
from bench.measure.workloads import Job

_READ = 65536


@dataclass(frozen=True)
class Part:
    """The content of one event or of a whole answer. tokens: None for as many as `completion_tokens`.

    at_limit: it ended at the number of tokens that was asked for, however the server counts them.
    """

    text: str = ""
    tokens: int | None = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str = ""
    at_limit: bool = False


class Dialect(Protocol):
    """How to ask a server for a fixed number of greedy tokens after a raw prompt, and how to read its answer.

    key: the bearer token, "" for none. An answer with an `error` is not given to `read`.
    """

    key: str = ""

    def ask(self, job: Job) -> tuple[str, str, Any]:
        """(method, path with query, JSON body or None)."""

    def read(self, answer: dict[str, Any]) -> Part:
        """One event's JSON object, or the whole answer's where the server does not stream."""


@dataclass(frozen=True)
class Ours(Dialect):
    """edge's own interface, streamed, with prefix reuse and speculation as the job has them.

    They are off in most workloads: the baseline has neither, and forced greedy text repeats itself, which
    would flatter prompt lookup. changes: fields of the request that are not as usual.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, job: Job) -> tuple[str, str, Any]:
        body = {"prompt": job.prompt, "raw": True, "max_tokens": job.tokens, "temperature": 0.0}
        allowed = {"cache_prompt": job.reuse, "speculate": job.speculate}
        forced = {"ignore_eos": True, "stream": True}
        return "POST", "/generate", body | allowed | forced | dict(self.changes)

    def read(self, answer: dict[str, Any]) -> Part:
        usage = answer.get("usage", {})
        return Part(
            text=answer.get("text", ""),
            tokens=answer.get("tokens", 0),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            finish=answer.get("finish_reason", ""),
        )


class Baseline(Dialect):
    """The tutorial's interface: one JSON answer when all is done."""

    def ask(self, job: Job) -> tuple[str, str, Any]:
        return "GET", "/generate?" + urlencode({"prompt": job.prompt, "max_new_tokens": job.tokens}), None

    def read(self, answer: dict[str, Any]) -> Part:
        usage = answer["usage"]
        return Part(
            text=answer["generate_text"],
            tokens=None,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            finish="length",
        )


Seen = Callable[[int], None]


def _unseen(_: int) -> None:
    """The default of `seen`."""


async def closed_loop(
    url: str,
    dialect: Dialect,
    jobs: Sequence[Job],
    clients: int,
    *,
    limit: float = 600.0,
    seen: Seen = _unseen,
) -> list[Sample]:
    """Run all `jobs` from `clients` connections at once; a sample for each, in the order of their ends.

    limit: seconds for one answer. A request that fails is a sample with an error; nothing is raised.
    seen: called with the number of tokens of each piece of text, as far as it is known by then.
    """
    waiting = deque(jobs)
    samples: list[Sample] = []

    async def client(number: int) -> None:
        while waiting:
            job = waiting.popleft()
            samples.append(await ask(url, dialect, job, client=number, limit=limit, seen=seen))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return samples


async def open_loop(
    url: str, dialect: Dialect, jobs: Sequence[Job], rate: float, *, seed: int = 0, limit: float = 600.0
) -> list[Sample]:
    """Send `jobs` at times of a Poisson process of `rate` requests/s, whatever becomes of those before.

    A sample for each, in the order of the jobs; its time begins when it should have been sent, so that a
    generator that is late is not in the server's favour.
    """
    draw = random.Random(seed)
    due = time.perf_counter()
    asked = []
    for job in jobs:
        due += draw.expovariate(rate)
        await asyncio.sleep(due - time.perf_counter())
        asked.append(asyncio.create_task(ask(url, dialect, job, limit=limit, start=due)))
    return await asyncio.gather(*asked)


async def ask(
    url: str,
    dialect: Dialect,
    job: Job,
    *,
    client: int = 0,
    limit: float = 600.0,
    start: float | None = None,
    seen: Seen = _unseen,
) -> Sample:
    """One request, from connecting (or from `start`, on time.perf_counter) to the end of its answer."""
    began = time.perf_counter() if start is None else start
    sample = Sample(client=client, prompt=job.index, wanted=job.tokens, start=began)
    try:
        async with asyncio.timeout(limit):
            await _exchange(url, dialect, job, sample, seen)
    except TimeoutError:
        sample.error = f"no whole answer within {limit:g} s"
    except (OSError, ProtocolError, ValueError, KeyError, UnicodeDecodeError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.end = sample.end or time.perf_counter()
    return sample


async def _exchange(url: str, dialect: Dialect, job: Job, sample: Sample, seen: Seen) -> None:
    method, path, body = dialect.ask(job)
    whole = bytearray()
    stream: Events | Lines | None = None
    message = request(method, urlsplit(url).netloc, path, body, key=dialect.key)
    async with contextlib.aclosing(_receive(url, message)) as pieces:
        async for moment, response, piece in pieces:
            stream = stream or _stream(response)
            if stream is None:
                whole += piece
                continue
            for event in stream.feed(piece):
                if event != "[DONE]":
                    _take(sample, dialect, json.loads(event), moment, seen)
    sample.end, sample.status = moment, response.status
    if sample.status != 200:
        sample.error = f"HTTP {sample.status}: {whole.decode('utf-8', 'replace')[:300]}"
    elif whole:
        _take(sample, dialect, json.loads(whole), moment, seen)
    if len(sample.events) > 1 and not any(tokens for _, tokens in sample.events):
        sample.events = spread_evenly(sample.events, sample.completion_tokens or 0)


def _take(sample: Sample, dialect: Dialect, answer: dict[str, Any], moment: float, seen: Seen) -> None:
    """Enter into `sample` what has come at `moment`."""
    if error := answer.get("error"):
        sample.error = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        return
    part = dialect.read(answer)
    if part.completion_tokens is not None:
        sample.prompt_tokens, sample.completion_tokens = part.prompt_tokens, part.completion_tokens
        if part.at_limit:
            sample.completion_tokens = sample.wanted
    sample.finish = part.finish or sample.finish
    if part.text:
        sample.text += part.text
        tokens = part.completion_tokens if part.tokens is None else part.tokens
        sample.events.append((moment, tokens or 0))
        seen(tokens or 1)


def _stream(response: Response) -> Events | Lines | None:
    """The reader of a streamed answer; None for one in one piece, an error, and before the head has come."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip()
    if response.status != 200:
        return None
    return Events() if kind == "text/event-stream" else Lines() if kind == "application/x-ndjson" else None


def spread_evenly(events: Sequence[tuple[float, int]], tokens: int) -> list[tuple[float, int]]:
    """`tokens` shared out among pieces of text whose server does not say how many each has.

    Whole numbers that differ by one at most and add up to `tokens`.
    """
    count = len(events)
    return [(when, (n + 1) * tokens // count - n * tokens // count) for n, (when, _) in enumerate(events)]


async def _receive(url: str, message: bytes) -> AsyncGenerator[tuple[float, Response, bytes], None]:
    """Send a request, and yield (when it came, the response, bytes of its body) for each piece of the answer.

    Raises OSError or ProtocolError.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or (443 if secure else 80), ssl=True if secure else None
    )
    response = Response()
    try:
        writer.write(message)
        while not response.done:
            data = await reader.read(_READ)
            moment = time.perf_counter()
            if not data:
                response.eof()
            yield moment, response, response.feed(data)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def get(
    url: str, path: str, *, limit: float = 10.0, key: str = "", body: Any = None
) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST of `body`. Raises OSError, TimeoutError or ProtocolError."""
    status, whole = 0, bytearray()
    message = request("GET" if body is None else "POST", urlsplit(url).netloc, path, body, key=key)
    async with asyncio.timeout(limit), contextlib.aclosing(_receive(url, message)) as pieces:
        async for _, response, piece in pieces:
            status = response.status
            whole += piece
    return status, bytes(whole)


async def get_json(url: str, path: str, *, key: str = "") -> Any:
    """What a GET is answered with, whatever its status. Raises what `get` raises, and ValueError."""
    _, body = await get(url, path, key=key)
    return json.loads(body)


@dataclass
class HealthProbe:
    """Asks `path` every `interval` seconds, whether or not the last question was answered.

    Waiting for the answer before asking again would hide a blocked server (coordinated omission). At most
    `most` questions are open, for systems allow few connections: what would be asked beyond is counted from
    that moment to the next answer. seconds: how long each took; failures: those that gave no 200.
    """

    url: str
    path: str = "/health"
    interval: float = 0.1
    key: str = ""
    most: int = 100
    seconds: list[float] = field(default_factory=list)
    failures: int = 0
    _open: set[asyncio.Task[None]] = field(default_factory=set)
    _unasked: list[float] = field(default_factory=list)

    async def __aenter__(self) -> HealthProbe:
        self._clock = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._clock.cancel()
        # The load is over: a server that was only busy answers now.
        await asyncio.gather(*self._open)

    async def _tick(self) -> None:
        while True:
            if len(self._open) < self.most:
                question = asyncio.create_task(self._ask())
                self._open.add(question)
                question.add_done_callback(self._open.discard)
            else:
                self._unasked.append(time.perf_counter())
            await asyncio.sleep(self.interval)

    async def _ask(self) -> None:
        began = time.perf_counter()
        try:
            status, _ = await get(self.url, self.path, limit=3600.0, key=self.key)
            self.failures += status != 200
        except (OSError, TimeoutError, ProtocolError):
            self.failures += 1
        now = time.perf_counter()
        self.seconds += [now - asked for asked in (began, *self._unasked)]
        self._unasked.clear()
