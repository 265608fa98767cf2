"""The sides of a race beside the bare llama.cpp loop: our engine, other libraries' loops, and servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.engines.race import Rates, Side, stream_rates
from bench.measure import workloads
from bench.measure.load import Dialect, closed_loop
from bench.measure.metrics import Sample, token_rate
from bench.servers import genai_loop
from bench.servers.target import Running, last_lines
from edge.backends.base import Backend
from edge.engine import protocol as msg
from edge.engine.core import Engine
from edge.engine.sampling import Params
from edge.errors import EdgeError

_INDEX = itertools.count()
# Processes that ask a server, where one would not keep up with what is measured.
ASKERS = 4
# Of what a process that failed wrote.
_LAST_LINES = 5


def new_jobs(count: int, tokens: int) -> list[workloads.Job]:
    """Requests for `tokens` output tokens. Their prompts, of some 85 tokens, are new to this process."""
    return [workloads.make(1, tokens, seed=7, first=next(_INDEX))[0] for _ in range(count)]


class Server:
    """A running server over HTTP. It reads prompts of its own, in words, of about the length asked for.

    clients: how many ask at once, each for its next answer when it has the last one; None: all. askers: the
    processes that they are spread over, because one of them reads some ten thousand pieces a second; None:
    this one.
    """

    def __init__(
        self, server: Running, clients: int | None = None, askers: ProcessPoolExecutor | None = None
    ) -> None:
        self.name, self.server, self._clients, self._askers = server.target.name, server, clients, askers

    def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Rates:
        """Ask for tokens[0] tokens in as many streams. Raises EdgeError where an answer is not whole."""
        jobs = new_jobs(len(tokens), tokens[0])
        clients = self._clients or len(jobs)
        where = self.server.url, self.server.target.dialect
        if self._askers is None:
            asked = [_ask(*where, jobs, clients)]
        else:
            count = min(ASKERS, clients)
            parts = [(jobs[n::count], len(range(n, clients, count))) for n in range(count)]
            asked = [one.result() for one in [self._askers.submit(_ask, *where, *part) for part in parts]]
        samples = [sample for part, _ in asked for sample in part]
        for sample in samples:
            if sample.state != "ok":
                raise EdgeError(
                    f"an answer of {self.name} is not whole: {sample.error or sample.completion_tokens}",
                    self.server.log_tail(),
                )
        return Rates(token_rate(samples), asking=max(share for _, share in asked))


def _ask(
    url: str, dialect: Dialect, jobs: Sequence[workloads.Job], clients: int
) -> tuple[list[Sample], float]:
    """All answers, and the share of a core that it took to ask for them and to read them."""
    wall, used = time.perf_counter(), time.process_time()
    samples = asyncio.run(closed_loop(url, dialect, jobs, clients))
    return samples, (time.process_time() - used) / (time.perf_counter() - wall)


class Ours:
    """Our engine over a backend, driven as its process drives it, without speculation.

    clients: so many prompts at once, each next one when an answer is whole; None: all.
    """

    def __init__(self, backend: Backend, name: str = "edge", clients: int | None = None) -> None:
        self.name, self._clients = name, clients
        self._events: list[tuple[float, msg.Event]] = []
        # One engine for all runs: it learns how long steps take.
        self._engine = Engine(backend, self._emit, speculate=False)
        self._keys = itertools.count()

    def _emit(self, events: list[msg.Event]) -> None:
        now = time.perf_counter()
        self._events += [(now, event) for event in events]

    def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Rates:
        """Raises EdgeError where a prompt is refused, or an answer has fewer tokens than asked for."""
        self._events.clear()
        began = time.perf_counter()
        times: dict[int, list[float]] = {}
        todo = list(zip(prompts, tokens, strict=True))[::-1]

        def submit() -> None:
            prompt, count = todo.pop()
            params = Params(temperature=0.0, max_tokens=count, ignore_eos=True)
            key = next(self._keys)
            self._engine.submit(msg.Submit(key, list(prompt), params, reuse=False))
            times[key] = []

        for _ in range(self._clients or len(prompts)):
            submit()
        done = read = total = 0
        while done < len(prompts):
            self._engine.turn()
            for moment, event in self._events[read:]:
                if isinstance(event, msg.Refused):
                    raise EdgeError(f"the engine refused a prompt: {event.message}")
                if isinstance(event, (msg.Delta, msg.Done)):
                    times[event.key] += [moment - began] * event.tokens
                if isinstance(event, msg.Done):
                    done, total = done + 1, total + event.completion_tokens
                    if todo:
                        submit()
            read = len(self._events)
        end = time.perf_counter()
        if total != sum(tokens):
            raise EdgeError(f"the engine made {total} tokens, {sum(tokens)} were asked for")
        return stream_rates(list(times.values()), tokens, end - began)


class Pair:
    """Two of a kind, in turn. Where a session's memory lies is luck: the first one that a process loads was
    3 to 6 % slower than later ones of the same file.
    """

    def __init__(self, first: Side, second: Side) -> None:
        self.name = first.name
        self._sides = [first, second]
        self._warm: set[tuple[int, ...]] = set()

    def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Rates:
        if tokens not in self._warm:
            # The round that is dropped warms both.
            self._sides[1].run(prompts, tokens)
            self._warm.add(tokens)
        self._sides.reverse()
        return self._sides[1].run(prompts, tokens)


class Generator:
    """onnxruntime-genai's own loop over an exported folder: one batch, which ends with its longest answer."""

    name = "onnxruntime-genai"

    def __init__(self, folder: Path, threads: int) -> None:
        self._loop = genai_loop.Loop(folder, threads)

    def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Rates:
        times = []
        began = time.perf_counter()
        generator = self._loop.generator(prompts, max(tokens))
        for _ in range(max(tokens)):
            generator.generate_next_token()
            generator.get_next_tokens()
            times.append(time.perf_counter() - began)
        return stream_rates([times[:count] for count in tokens], tokens, times[-1])


class OpenVINO:
    """OpenVINO GenAI over a GGUF file in a process of its own, without HTTP; entered while it runs.

    command: how it is started, see bench/servers/openvino_child.py.
    """

    name = "OpenVINO GenAI"

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self.version = ""

    def __enter__(self) -> OpenVINO:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        self.version = str(self._answer()["version"])
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        # Closes the pipes, too.
        self._process.communicate()
        self._errors.close()

    def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Rates:
        """Raises EdgeError where it ends, or an answer has fewer tokens than asked for."""
        assert self._process.stdin is not None
        asked = {"prompts": [list(prompt) for prompt in prompts], "tokens": list(tokens)}
        # One that is gone is noticed by its answer, which does not come.
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(asked).encode("ascii") + b"\n")
            self._process.stdin.flush()
        answer = self._answer()
        if answer["made"] != list(tokens):
            raise EdgeError(f"{self.name} made {answer['made']} tokens, {list(tokens)} were asked for")
        return Rates(sum(tokens) / answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        """The next line that is an answer; the library writes others."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(b"{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        code = self._process.wait()
        self._errors.seek(0)
        said = last_lines(self._errors.read(), _LAST_LINES)
        hint = "\n    ".join([" ".join(self._command), *said])
        raise EdgeError(f"{self.name} ended with code {code}", hint)


class Transformers:
    """transformers' generate, one request after the other, as the tutorial's server does.

    most: requests of which the rate is taken; more of them would not change it.
    """

    def __init__(self, merged: Path, *, dtype: str, device: str, threads: int, most: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        self.name = f"transformers {dtype}"
        disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._device, self._most = device, most
        self._model = AutoModelForCausalLM.from_pretrained(
            merged, dtype=getattr(torch, dtype), local_files_only=True
        ).to(device)

    def run(self, prompts: Sequence[Sequence[int]], tokens: tuple[int, ...]) -> Rates:
        tokens = tokens[: self._most]
        began = time.perf_counter()
        for prompt, count in zip(prompts, tokens, strict=False):
            ids = self._torch.tensor([prompt], device=self._device)
            with self._torch.inference_mode():
                output = self._model.generate(
                    input_ids=ids,
                    attention_mask=self._torch.ones_like(ids),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    pad_token_id=0,
                )
            if output.shape[1] != len(prompt) + count:
                raise EdgeError(f"transformers made {output.shape[1] - len(prompt)} tokens, not {count}")
        return Rates(sum(tokens) / (time.perf_counter() - began))
