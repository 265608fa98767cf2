"""Counters and gauges in Prometheus' text format. A stream is counted once, when it ends."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

from edge.engine import protocol as msg
from edge.engine.client import EngineProcess

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_TPOT_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_ANSWER_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = {
    "prompt": "Tokens of prompts.",
    "cached": "Tokens of prompts that came from the KV cache.",
    "completion": "Tokens generated.",
    "drafted": "Tokens that speculation proposed.",
    "accepted": "Proposed tokens that were right.",
}
_HISTOGRAMS = {
    "edge_queue_seconds": ("Seconds until a slot was free.", _TTFT_S),
    "edge_time_to_first_token_seconds": ("Seconds until the first token.", _TTFT_S),
    "edge_time_per_output_token_seconds": ("Seconds for each token after the first.", _TPOT_S),
    "edge_answer_seconds": ("Seconds for the whole answer.", _ANSWER_S),
}
_GAUGES: dict[str, tuple[str, Callable[[EngineProcess], int]]] = {
    "edge_ready": ("1 where the model can answer.", lambda e: int(e.ready is not None)),
    "edge_restarts_total": ("Engine processes that died.", lambda e: e.restarts),
    "edge_running_requests": ("Requests with a slot.", lambda e: e.stats.running if e.stats else 0),
    "edge_waiting_requests": ("Requests in the queue.", lambda e: e.stats.waiting if e.stats else 0),
    "edge_kv_tokens": ("Tokens in the KV cache.", lambda e: e.stats.kv_tokens if e.stats else 0),
    "edge_kv_cells": ("Cells of the KV cache.", lambda e: e.ready.capacity if e.ready else 0),
    "edge_cache_ram_bytes": ("Bytes of prefixes kept in RAM.", lambda e: e.stats.ram_bytes if e.stats else 0),
    "edge_cache_ram_hits_total": (
        "Requests that took a prefix from RAM.",
        lambda e: e.stats.ram_hits if e.stats else 0,
    ),
    "edge_cache_ram_evictions_total": (
        "Prefixes that had to leave the RAM.",
        lambda e: e.stats.ram_evictions if e.stats else 0,
    ),
    "edge_steps_total": ("Steps of the model.", lambda e: e.stats.steps if e.stats else 0),
}
# (suffix of the metric's name, labels, value)
_Row = tuple[str, Mapping[str, object], float]


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def rows(self, model: str) -> Iterable[_Row]:
        total = 0
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            yield "_bucket", {"model": model, "le": "+Inf" if bound is None else f"{bound:g}"}, total
        yield "_sum", {"model": model}, round(self._sum, 6)
        yield "_count", {"model": model}, total


class _ModelCounts:
    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.histograms = {name: _Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}


class Metrics:
    """Counts of HTTP requests and of what the models generated."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._models: dict[str, _ModelCounts] = defaultdict(_ModelCounts)

    def answered(self, route: str, method: str, status: int) -> None:
        """Count a request. route: the path of the route, not the client's."""
        self._requests[route, method, status] += 1

    def ended(self, name: str, done: msg.Done) -> None:
        """Count an answer that has ended, whole or not."""
        model = self._models[name]
        model.reasons[done.reason] += 1
        model.tokens.update(
            prompt=done.prompt_tokens,
            cached=done.cached_tokens,
            completion=done.completion_tokens,
            drafted=done.drafted,
            accepted=done.accepted,
        )
        seconds = {"edge_queue_seconds": done.queue_s}
        if done.completion_tokens:
            first = seconds["edge_time_to_first_token_seconds"] = done.queue_s + done.prefill_s
            seconds["edge_answer_seconds"] = first + done.decode_s
        if done.completion_tokens > 1:
            seconds["edge_time_per_output_token_seconds"] = done.decode_s / (done.completion_tokens - 1)
        for metric, value in seconds.items():
            model.histograms[metric].add(value)

    def text(self, engines: Mapping[str, EngineProcess]) -> str:
        """The whole page. engines: the loaded ones by their models' ids, for the gauges."""
        requests = [
            ("", {"route": route, "method": method, "status": status}, count)
            for (route, method, status), count in sorted(self._requests.items())
        ]
        answers = [
            ("", {"model": name, "reason": reason}, count)
            for name, model in self._models.items()
            for reason, count in sorted(model.reasons.items())
        ]
        page = _metric(
            "edge_http_requests_total", "counter", "Requests answered, by route, method and status.", requests
        )
        page += _metric("edge_answers_total", "counter", "Answers that ended, by reason.", answers)
        for kind, about in _TOKENS.items():
            tokens = [("", {"model": name}, model.tokens[kind]) for name, model in self._models.items()]
            page += _metric(f"edge_{kind}_tokens_total", "counter", about, tokens)
        for metric, (about, _) in _HISTOGRAMS.items():
            rows = (model.histograms[metric].rows(name) for name, model in self._models.items())
            page += _metric(metric, "histogram", about, chain.from_iterable(rows))
        for metric, (about, read) in _GAUGES.items():
            kind = "counter" if metric.endswith("_total") else "gauge"
            gauges = [("", {"model": name}, read(engine)) for name, engine in engines.items()]
            page += _metric(metric, kind, about, gauges)
        return page


def merged(pages: Mapping[str, str]) -> str:
    """One page of several servers' pages: their rows name their server as `replica`. pages: by that name."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name, page in pages.items():
        label = f'{{replica="{_escaped(name)}",'
        for block in filter(None, re.split(r"(?m)^(?=# HELP )", page)):
            head = re.match(r"(?:#.*\n)*", block)
            assert head is not None
            blocks[head[0]] += [row.replace("{", label, 1) for row in block[head.end() :].splitlines(True)]
    return "".join(head + "".join(rows) for head, rows in blocks.items())


def _metric(name: str, kind: str, about: str, rows: Iterable[_Row]) -> str:
    """One metric's lines: its help, its type, and a line for each row."""
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for suffix, labels, value in rows:
        pairs = ",".join(f'{label}="{_escaped(str(text))}"' for label, text in labels.items())
        lines.append(f"{name}{suffix}{{{pairs}}} {value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
