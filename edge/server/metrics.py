"""What a server did, in Prometheus' text format. Nothing is counted for each event of a stream."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING

from edge.engine import protocol as msg

if TYPE_CHECKING:
    from edge.server.model_registry import Registry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_TPOT_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_WHOLE_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class _Model:
    """The counts of one model."""

    def __init__(self) -> None:
        self.ends: dict[str, int] = defaultdict(int)
        self.tokens = dict.fromkeys(("prompt", "cached", "completion", "drafted", "accepted"), 0)
        self.ttft = _Histogram(_TTFT_S)
        self.tpot = _Histogram(_TPOT_S)
        self.whole = _Histogram(_WHOLE_S)
        self.queued = _Histogram(_TTFT_S)


class Metrics:
    """Counts of requests and of what models made."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, int], int] = defaultdict(int)
        self._models: dict[str, _Model] = defaultdict(_Model)

    def answered(self, route: str, method: str, status: int) -> None:
        """A request was answered. route: the path of the route, not the client's."""
        self._requests[route, method, status] += 1

    def ended(self, name: str, done: msg.Done) -> None:
        """An answer has ended, whole or not."""
        model = self._models[name]
        model.ends[done.reason] += 1
        model.tokens["prompt"] += done.prompt_tokens
        model.tokens["cached"] += done.cached_tokens
        model.tokens["completion"] += done.completion_tokens
        model.tokens["drafted"] += done.drafted
        model.tokens["accepted"] += done.accepted
        model.queued.add(done.queue_s)
        if done.completion_tokens:
            model.ttft.add(done.queue_s + done.prefill_s)
            model.whole.add(done.queue_s + done.prefill_s + done.decode_s)
        if done.completion_tokens > 1:
            model.tpot.add(done.decode_s / (done.completion_tokens - 1))

    def text(self, registry: Registry) -> str:
        """All of it, with the gauges of the loaded engines."""
        page = _Page()
        page.head("edge_http_requests_total", "counter", "Requests answered, by route, method and status.")
        for (route, method, status), count in sorted(self._requests.items()):
            page.row("edge_http_requests_total", count, route=route, method=method, status=status)
        page.head("edge_answers_total", "counter", "Answers that ended, by reason.")
        for name, model in self._models.items():
            for reason, count in sorted(model.ends.items()):
                page.row("edge_answers_total", count, model=name, reason=reason)
        for kind, about in (
            ("prompt", "Tokens of prompts."),
            ("cached", "Tokens of prompts that came from the KV cache."),
            ("completion", "Tokens made."),
            ("drafted", "Tokens that speculation proposed."),
            ("accepted", "Tokens of those that were right."),
        ):
            page.head(f"edge_{kind}_tokens_total", "counter", about)
            for name, model in self._models.items():
                page.row(f"edge_{kind}_tokens_total", model.tokens[kind], model=name)
        for key, about in (
            ("queued", "Seconds until a slot was free."),
            ("ttft", "Seconds until the first token."),
            ("tpot", "Seconds for each token after the first."),
            ("whole", "Seconds for the whole answer."),
        ):
            self._histogram(page, key, about)
        _gauges(page, registry)
        return page.text()

    def _histogram(self, page: _Page, key: str, about: str) -> None:
        metric = {
            "queued": "edge_queue_seconds",
            "ttft": "edge_time_to_first_token_seconds",
            "tpot": "edge_time_per_output_token_seconds",
            "whole": "edge_answer_seconds",
        }[key]
        page.head(metric, "histogram", about)
        for name, model in self._models.items():
            histogram: _Histogram = getattr(model, key)
            total = 0
            for bound, count in zip((*histogram.bounds, None), histogram.counts, strict=True):
                total += count
                page.row(f"{metric}_bucket", total, model=name, le="+Inf" if bound is None else f"{bound:g}")
            page.row(f"{metric}_sum", round(histogram.sum, 6), model=name)
            page.row(f"{metric}_count", total, model=name)


def _gauges(page: _Page, registry: Registry) -> None:
    loaded = [(known.name, known.serving.engine) for known in registry.loaded if known.serving is not None]
    for metric, kind, about, read in (
        ("edge_ready", "gauge", "1 where the model can answer.", lambda e: int(e.ready is not None)),
        ("edge_restarts_total", "counter", "Engine processes that died.", lambda e: e.restarts),
        ("edge_running_requests", "gauge", "Requests with a slot.", lambda e: e.stats and e.stats.running),
        ("edge_waiting_requests", "gauge", "Requests in the queue.", lambda e: e.stats and e.stats.waiting),
        ("edge_kv_tokens", "gauge", "Tokens in the KV cache.", lambda e: e.stats and e.stats.kv_tokens),
        ("edge_kv_cells", "gauge", "Cells of the KV cache.", lambda e: e.ready and e.ready.capacity),
        ("edge_steps_total", "counter", "Steps of the model.", lambda e: e.stats and e.stats.steps),
    ):
        page.head(metric, kind, about)
        for name, engine in loaded:
            page.row(metric, read(engine) or 0, model=name)


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def head(self, metric: str, kind: str, about: str) -> None:
        self._lines += [f"# HELP {metric} {about}", f"# TYPE {metric} {kind}"]

    def row(self, metric: str, value: float, **labels: object) -> None:
        pairs = ",".join(f'{name}="{_escaped(str(text))}"' for name, text in labels.items())
        self._lines.append(f"{metric}{{{pairs}}} {value}" if pairs else f"{metric} {value}")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
