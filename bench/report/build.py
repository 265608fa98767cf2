"""From measured rounds to the report, as plain data.

Every figure and every ratio is computed here, once, from the samples, which the report keeps. A ratio is
taken round by round between neighbours in time, and withheld where the two sides did different work.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.measure import metrics, process_probe, roofline, workloads
from bench.rounds import Case, Measured, Round
from edge.artefact import manifest
from edge.machine import hardware

SCHEMA = 4
_IDLE_LIMIT = 0.05
_PACKAGES = (
    "edge", "llama-cpp-python", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "numpy",
    "fastapi", "uvicorn",
)  # fmt: skip
# Of one round: the figure, and whether more is better.
_RATIOS: dict[str, tuple[Callable[[Sequence[metrics.Sample]], float | None], bool]] = {
    "tokens_per_s": (metrics.token_rate, True),
    "ttft_s": (lambda s: metrics.median([t for x in s if (t := metrics.ttft(x)) is not None]), False),
    "e2e_s": (lambda s: metrics.median([metrics.e2e(x) for x in s]), False),
}


def build(
    measured: Sequence[Measured],
    *,
    plan: workloads.Plan,
    asked_tokens: int,
    command: str,
    model: dict[str, Any],
    noise: tuple[process_probe.Noise, process_probe.Noise],
    gpu: roofline.Bandwidth | None,
    footprints: Mapping[str, roofline.Footprint | None],
    quality: Mapping[str, dict[str, Any]],
    sweeps: dict[str, list[dict[str, Any]]],
    together: bool,
    seconds: float,
) -> dict[str, Any]:
    """The report: plain data, times in seconds, sizes in bytes. The first of `measured` is the reference.

    plan: what was kept of what was asked for; asked_tokens: the answers' length before it was shortened.
    gpu: read bandwidth of the GPU's memory. footprints: by target, for the ceiling of decoding; None or
    nothing leaves it out. quality, sweeps: of each target, see bench.report.quality and bench.rate_sweep.
    """
    report = {
        "schema": SCHEMA,
        "kind": "bench",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "seconds": round(seconds, 1),
        "model": model,
        "settings": asdict(plan) | {"asked_tokens": asked_tokens},
        "workloads": {name: workloads.WORKLOADS[name].about for name in plan.workloads},
        "together": together,
        "machine": hardware.describe(),
        "versions": manifest.versions(*_PACKAGES),
        "noise": {"before": asdict(noise[0]), "after": asdict(noise[1])},
        "memory": {part.target.name: _memory(part, gpu) for part in measured},
        "objective": asdict(metrics.OBJECTIVE),
        "reference": measured[0].target.name,
        "targets": {
            part.target.name: _target(part, measured[0]) | {"quality": quality.get(part.target.name, {})}
            for part in measured
        },
        "cases": [
            _case((name, clients), measured, gpu, footprints)
            for name in plan.workloads
            for clients in plan.clients
        ],
        "sweeps": sweeps,
        "warnings": [],
    }
    report["warnings"] = _warnings(report, measured, noise)
    return report


def _target(part: Measured, reference: Measured) -> dict[str, Any]:
    # Whatever its path, this interpreter is shown as `python`.
    words = ["python" if word == sys.executable else word for word in part.target.command]
    return {
        "command": shown(words or [part.target.url]),
        "stage": part.target.stage,
        "unforced": part.unforced,
        "answers_s": round(part.answers_s, 2),
        "load_s": round(part.load_s, 2),
        "memory_peak": part.memory_peak,
        "memory_steady": part.memory_steady,
        "gpu_memory": part.gpu_memory,
        "memory_ratio": _quotient(reference.memory_steady, part.memory_steady),
        "about": shown(part.about),
    }


def shown(value: Any) -> Any:
    """Plain data with absolute paths cut to their last part, as other machines lack the rest."""
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shown(item) for item in value]
    is_path = isinstance(value, str) and "\n" not in value and len(value) < 1024 and Path(value).is_absolute()
    return Path(value).name if is_path else value


def _case(
    case: Case,
    measured: Sequence[Measured],
    gpu: roofline.Bandwidth | None,
    footprints: Mapping[str, roofline.Footprint | None],
) -> dict[str, Any]:
    reference = measured[0]
    targets = {}
    for part in measured:
        figures = _figures(part.rounds[case])
        name = part.target.name
        limit = gpu if part.on_gpu else None
        figures["ceiling"] = _ceiling(part.rounds[case], limit, footprints.get(name))
        targets[name] = figures
    return {
        "workload": case[0],
        "clients": case[1],
        "rounds": len(reference.rounds[case]),
        "targets": targets,
        "against": {part.target.name: _against(case, reference, part) for part in measured[1:]},
    }


def _against(case: Case, reference: Measured, part: Measured) -> dict[str, Any]:
    """How many times better `part` is than the reference, round by round; or why they are not compared."""
    pairs = list(zip(reference.rounds[case], part.rounds[case], strict=True))
    reasons = (different_work(reference, theirs, part, own) for theirs, own in pairs)
    why = next(filter(None, reasons), "")
    ratios: dict[str, Any] = {}
    for name, (figure, more_is_better) in _RATIOS.items():
        theirs, own = ([figure(side.samples) for side in sides] for sides in zip(*pairs, strict=True))
        ratio = metrics.ratio(own, theirs) if more_is_better else metrics.ratio(theirs, own)
        ratios[name] = None if why or ratio is None else asdict(ratio)
    return {"comparable": not why, "why": why, "ratios": ratios}


def _memory(part: Measured, gpu: roofline.Bandwidth | None) -> dict[str, Any] | None:
    """The best reading of the memory that the target's model lies in; None where there was none."""
    readings = [result.memory for rounds in part.rounds.values() for result in rounds if result.memory]
    best = gpu if part.on_gpu else max(readings, default=None)
    return asdict(best) if best else None


def _ceiling(
    rounds: Sequence[Round], gpu: roofline.Bandwidth | None, footprint: roofline.Footprint | None
) -> dict[str, Any] | None:
    """The tokens/s that the memory allows one stream, and the share of it that one client's decoding reached.

    Medians over the rounds, each by the memory's bandwidth around it. Of an answer in one piece only the
    whole time is known, its prompt included.
    """
    ceilings = []
    for part in rounds:
        memory, samples = gpu or part.memory, metrics.complete(part.samples)
        if footprint is None or memory is None or len({sample.client for sample in samples}) != 1:
            continue
        per_token_s = [seconds for sample in samples if (seconds := metrics.tpot(sample))]
        whole_s = [metrics.e2e(sample) / sample.wanted for sample in samples]
        seconds = statistics.median(per_token_s or whole_s)
        prompts = [sample.prompt_tokens or 0 for sample in samples]
        per_token = footprint.per_token(roofline.context_of(prompts, samples[0].wanted))
        most = roofline.ceiling(memory, per_token)
        ceilings.append({"bytes_per_token": per_token, "tokens_per_s": most, "share": 1.0 / seconds / most})
    if not ceilings:
        return None
    return {key: statistics.median(entry[key] for entry in ceilings) for key in ceilings[0]}


def _figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """One target's figures over all rounds; rates are the median over the rounds."""
    samples = [sample for part in rounds for sample in part.samples]
    rates = [metrics.token_rate(part.samples) for part in rounds]
    tokens = sum(sample.completion_tokens or 0 for sample in metrics.complete(samples))
    return metrics.summary(samples) | {
        "tokens_per_s": metrics.median(rates),
        "total_tokens_per_s": metrics.median([metrics.total_rate(part.samples) for part in rounds]),
        "requests_per_s": metrics.median([metrics.request_rate(part.samples) for part in rounds]),
        "rates": rates,
        "tokens_per_s_interval": metrics.interval(rates),
        "goodput": metrics.median([metrics.goodput(part.samples, metrics.OBJECTIVE)[0] for part in rounds]),
        "goodput_share": metrics.goodput(samples, metrics.OBJECTIVE)[1],
        "cpu_s_per_token": _quotient(sum(part.cpu for part in rounds), tokens),
        "health_s": metrics.spread([seconds for part in rounds for seconds in part.health]),
        "health_failures": sum(part.health_failures for part in rounds),
        "other_idle_share": [round(part.idle, 4) for part in rounds],
        "samples": [[sample.record() for sample in part.samples] for part in rounds],
    }


def different_work(slow: Measured, a: Round, fast: Measured, b: Round) -> str:
    """Why the two sides of a round may not be compared; "" where they did the same work."""
    for part, side in ((slow, a), (fast, b)):
        for sample in side.samples:
            if sample.state != "ok":
                short = f"{sample.completion_tokens} of {sample.wanted} tokens ({sample.finish})"
                return f"{part.target.name} did not finish prompt {sample.prompt}: {sample.error or short}"
    read = [{s.prompt: (s.prompt_tokens, s.completion_tokens) for s in side.samples} for side in (a, b)]
    for prompt in sorted(read[0].keys() | read[1].keys()):
        counts = [side.get(prompt) for side in read]
        if counts[0] != counts[1]:
            return (
                f"prompt {prompt}: {slow.target.name} and {fast.target.name} counted "
                f"{counts[0]} and {counts[1]} (prompt, output) tokens"
            )
    return ""


def _warnings(
    report: dict[str, Any],
    measured: Sequence[Measured],
    noise: tuple[process_probe.Noise, process_probe.Noise],
) -> list[str]:
    warnings = process_probe.warnings(*noise)
    tokens, asked = report["settings"]["tokens"], report["settings"]["asked_tokens"]
    if tokens != asked:
        warnings.append(f"answers were shortened from {asked} to {tokens} tokens to stay within the time")
    if not report["together"]:
        warnings.append("memory did not hold all servers: they ran one after the other, not alternately")
    for target, side in report["targets"].items():
        if side["unforced"]:
            reason = side["unforced"]
            warnings.append(f"{target} cannot be forced to the number of output tokens: {reason}")
        if "missing" in side["quality"]:
            missing = side["quality"]["missing"]
            warnings.append(f"{target}: its distance from the merged model is not known: {missing}")
    for case in report["cases"]:
        name = f"{case['workload']}, {case['clients']} client(s)"
        warnings += [f"{name}: not compared: {a['why']}" for a in case["against"].values() if a["why"]]
        if case["rounds"] == 1:
            warnings.append(f"{name}: a single round, so the ratio has no spread")
    idle = (part.idle for side in measured for rounds in side.rounds.values() for part in rounds)
    if (busy := max(idle, default=0.0)) > _IDLE_LIMIT:
        warnings.append(f"the server that should have been idle used {busy:.0%} of a processor")
    return warnings


def _quotient(a: float, b: float) -> float | None:
    return a / b if a and b else None


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """What the last line on standard output says."""
    return {
        "run": report["model"]["run"],
        "tokens": report["settings"]["tokens"],
        "reference": report["reference"],
        "memory_ratio": {
            name: _round(side["memory_ratio"])
            for name, side in report["targets"].items()
            if name != report["reference"]
        },
        "cases": [
            {
                "workload": case["workload"],
                "clients": case["clients"],
                "tokens_per_s": {n: _round(side["tokens_per_s"]) for n, side in case["targets"].items()},
                "against": {
                    name: {n: _round(r["value"]) if r else None for n, r in side["ratios"].items()}
                    | {"comparable": side["comparable"]}
                    for name, side in case["against"].items()
                },
            }
            for case in report["cases"]
        ],
        "warnings": len(report["warnings"]),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
