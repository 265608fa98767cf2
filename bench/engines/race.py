"""Engines without HTTP, side by side: each side answers prompts of equal length greedily, to a forced length.

A side has a `name` and `run(prompts, tokens)`, which makes `tokens[i]` tokens after `prompts[i]` and gives
rates. `race` takes the sides through several cases in turn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from bench.engines.bare_llamacpp import Bare, Setting
from bench.measure.metrics import median, ratio
from bench.servers import genai_loop
from edge.backends.base import Backend
from edge.engine import protocol as msg
from edge.engine.core import Engine
from edge.engine.sampling import Params
from edge.errors import EdgeError

PAUSE_S = 0.2


@dataclass(frozen=True)
class Rates:
    """Tokens a second: of all that was asked for, prompts included; and while all streams were decoding.

    decode is None where single tokens are not seen.
    """

    total: float
    decode: float | None


def rates(times: Sequence[Sequence[float]], tokens: Sequence[int], seconds: float) -> Rates:
    """times: when each token of each stream came, in seconds."""
    first, last = max(one[0] for one in times), min(one[-1] for one in times)
    between = sum(first < at <= last for one in times for at in one)
    return Rates(sum(tokens) / seconds, between / (last - first) if last > first else None)


class Side(Protocol):
    name: str

    def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> Rates: ...


class Ours:
    """The engine over a backend, driven as its process drives it, without speculation."""

    def __init__(self, backend: Backend, name: str = "edge") -> None:
        self.name = name
        self.vocab = backend.info.vocab
        self._events: list[tuple[float, msg.Event]] = []
        # One for all runs: it learns how long steps take.
        self._engine = Engine(backend, self._emit, speculate=False)
        self._key = 0

    def _emit(self, events: list[msg.Event]) -> None:
        now = time.perf_counter()
        self._events += [(now, event) for event in events]

    def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> Rates:
        self._events.clear()
        began = time.perf_counter()
        times: dict[int, list[float]] = {}
        for prompt, count in zip(prompts, tokens, strict=True):
            params = Params(temperature=0.0, max_tokens=count, ignore_eos=True)
            self._engine.submit(msg.Submit(self._key, prompt, params, reuse=False))
            times[self._key] = []
            self._key += 1
        done = seen = made = 0
        while done < len(prompts):
            self._engine.turn()
            for at, event in self._events[seen:]:
                if isinstance(event, msg.Refused):
                    raise EdgeError(f"the engine refused a prompt: {event.message}")
                if isinstance(event, (msg.Delta, msg.Done)):
                    times[event.key] += [at - began] * event.tokens
                if isinstance(event, msg.Done):
                    done, made = done + 1, made + event.completion_tokens
            seen = len(self._events)
        end = time.perf_counter()
        if made != sum(tokens):
            raise EdgeError(f"the engine made {made} tokens, {sum(tokens)} were asked for")
        return rates(list(times.values()), tokens, end - began)


class Two:
    """Two of a kind, in turn. Where a session's memory comes to lie is luck: the first one that a process
    loads was 3 to 6 % slower than later ones of the same file.
    """

    def __init__(self, one: Side, other: Side) -> None:
        self.name = one.name
        self._sides = [one, other]
        self._warm: set[tuple[int, ...]] = set()

    def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> Rates:
        if tokens not in self._warm:
            # The round that is dropped warms both for what is asked.
            self._sides[1].run(prompts, tokens)
            self._warm.add(tokens)
        self._sides.reverse()
        return self._sides[1].run(prompts, tokens)


class Generator:
    """onnxruntime-genai's own loop over an exported folder: one batch, which ends with its longest answer."""

    name = "onnxruntime-genai"

    def __init__(self, folder: Path, threads: int) -> None:
        self._loop = genai_loop.Loop(folder, threads)

    def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> Rates:
        times = []
        began = time.perf_counter()
        generator = self._loop.generator(prompts, max(tokens))
        for _ in range(max(tokens)):
            generator.generate_next_token()
            generator.get_next_tokens()
            times.append(time.perf_counter() - began)
        end = time.perf_counter()
        return rates([times[:count] for count in tokens], tokens, end - began)


class Loop:
    """The bare llama.cpp loop over a GGUF, of `setting` but for the streams; see bench.engines.bare_llamacpp."""

    name = "bare llama.cpp loop"

    def __init__(self, path: Path, *, gpu: bool, unified: bool, flash_attention: bool, threads: int) -> None:
        self._bare = Bare(path, gpu=gpu)
        self._unified, self._flash, self._threads = unified, flash_attention, threads

    def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> Rates:
        read, streams = len(prompts[0]), len(prompts)
        cells = -(-(read + tokens[0] + 1) // 256) * 256
        setting = Setting(streams, streams * cells, self._threads, self._flash, self._unified)
        found = self._bare.run(setting, prompt=read, new=tokens[0] - 1)
        return Rates(found["total_tokens_per_s"], found["decode_tokens_per_s"])


class Transformers:
    """transformers' generate, one request after the other, as the tutorial's server does.

    most: of how many requests the rate is taken; that of more is no other.
    """

    def __init__(self, merged: Path, *, dtype: str, device: str, threads: int, most: int = 64) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        self.name = "transformers " + {"float32": "fp32", "bfloat16": "bf16"}[dtype]
        disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._device, self._most = device, most
        model = AutoModelForCausalLM.from_pretrained(
            merged, dtype=getattr(torch, dtype), local_files_only=True
        )
        self._model = model.to(device)

    def run(self, prompts: list[list[int]], tokens: tuple[int, ...]) -> Rates:
        tokens = tokens[: self._most]
        began = time.perf_counter()
        for prompt, count in zip(prompts, tokens, strict=False):
            ids = self._torch.tensor([prompt], device=self._device)
            with self._torch.inference_mode():
                made = self._model.generate(
                    input_ids=ids,
                    attention_mask=self._torch.ones_like(ids),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    pad_token_id=0,
                )
            if made.shape[1] != len(prompt) + count:
                raise EdgeError(f"transformers made {made.shape[1] - len(prompt)} tokens, not {count}")
        return Rates(sum(tokens) / (time.perf_counter() - began), None)


@dataclass(frozen=True)
class Case:
    """What is asked and which rate counts: "decode" or "total". goals: how much faster than a side."""

    name: str
    tokens: tuple[int, ...]
    rate: str
    goals: dict[str, float]
    sides: tuple[Side, ...]


def race(
    cases: list[Case], console: Console, *, prompt: int, vocab: int, rounds: int, slow_rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Case -> side -> rates of its rounds, all sides in turn; the first round warms them and is dropped.

    slow_rounds: rounds of Transformers that count where there are many streams; earlier cases warmed it.
    """
    found: dict[str, dict[str, list[float]]] = {}
    seed = 0
    for case in cases:
        by = found[case.name] = {side.name: list[float]() for side in case.sides}
        for turn in range(rounds + 1):
            seed += 1
            draw = np.random.default_rng(seed)
            prompts = draw.integers(100, vocab - 100, (len(case.tokens), prompt)).tolist()
            # Whoever comes after a slow one finds a card that has idled, or caches that are not its own.
            for side in case.sides if turn % 2 else case.sides[::-1]:
                if isinstance(side, Transformers) and len(prompts) > 1 and not 0 < turn <= slow_rounds:
                    continue
                console.print(f"{case.name}: {side.name}, round {turn} of {rounds}")
                time.sleep(PAUSE_S)
                made = getattr(side.run(prompts, case.tokens), case.rate)
                by[side.name] += [made] if turn else []
        for row in rows(case, by):
            console.print(f"{row[0]}: {row[1]}, {row[3]} {row[2]}: {row[4]}, goal {row[5]}", soft_wrap=True)
    return found


def rows(case: Case, by: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """(case, first side's rate, another's, its name, how much faster, goal) for each of the other sides.

    Rounds that both ran are compared.
    """
    made = []
    (_, mine), *others = by.items()
    for name, values in others:
        pair = ratio(mine[: len(values)], values)
        goal = case.goals.get(name)
        shown = f"{pair.value:.2f} x ({pair.low:.2f} to {pair.high:.2f})" if pair else "-"
        mark = "" if goal is None or pair is None else " reached" if pair.value >= goal else " MISSED"
        ours, other = median(mine) or 0.0, median(values) or 0.0
        made.append((case.name, f"{ours:.1f}", f"{other:.1f}", name, shown, f"{goal or '-'}{mark}"))
    return made
