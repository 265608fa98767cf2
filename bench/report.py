"""From measured rounds to report.json, report.md and the table on the terminal.

Every figure and every ratio is computed here, once, from the samples, which the report keeps. A ratio is
taken round by round between neighbours in time, and withheld where the two sides did different work.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import metrics
from bench.metrics import Sample
from bench.probe import Noise
from edge import hardware, manifest

if TYPE_CHECKING:
    from bench.run import Measured, Plan, Round

SCHEMA = 1
_IDLE_LIMIT = 0.05
_PACKAGES = ("edge", "llama-cpp-python", "torch", "transformers", "numpy", "fastapi", "uvicorn")
# Of one round: the figure, and whether more is better.
_RATIOS: dict[str, tuple[Callable[[Sequence[Sample]], float | None], bool]] = {
    "tokens_per_s": (metrics.token_rate, True),
    "ttft_s": (lambda s: metrics.median([t for x in s if (t := metrics.ttft(x)) is not None]), False),
    "e2e_s": (lambda s: metrics.median([metrics.e2e(x) for x in s]), False),
}


def build(
    measured: Sequence[Measured],
    *,
    plan: Plan,
    asked_tokens: int,
    command: str,
    model: dict[str, Any],
    noise: tuple[Noise, Noise],
    together: bool,
    seconds: float,
) -> dict[str, Any]:
    """The report: plain data, times in seconds, sizes in bytes. measured: the baseline, then ours.

    plan: what was kept of what was asked for; asked_tokens: the answers' length before it was shortened.
    """
    slow, fast = measured
    cases = [_case(clients, slow, fast) for clients in plan.clients]
    made = {
        "schema": SCHEMA,
        "kind": "bench",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "seconds": round(seconds, 1),
        "model": model,
        "settings": asdict(plan) | {"asked_tokens": asked_tokens},
        "together": together,
        "machine": hardware.describe(),
        "versions": manifest.versions(*_PACKAGES),
        "noise": {"before": asdict(noise[0]), "after": asdict(noise[1])},
        "targets": {part.target.name: _target(part) for part in measured},
        "memory_ratio": _quotient(slow.memory_steady, fast.memory_steady),
        "cases": cases,
        "warnings": [],
    }
    made["warnings"] = _warnings(made, measured, noise)
    return made


def _target(part: Measured) -> dict[str, Any]:
    return {
        # The interpreter's own path says nothing to another reader.
        "command": ["python", *part.target.command[1:]],
        "load_s": round(part.load_s, 2),
        "memory_peak": part.memory_peak,
        "memory_steady": part.memory_steady,
        "about": part.about,
    }


def _case(clients: int, slow: Measured, fast: Measured) -> dict[str, Any]:
    why = ""
    ratios: dict[str, Any] = {}
    pairs = list(zip(slow.rounds[clients], fast.rounds[clients], strict=True))
    for a, b in pairs:
        why = why or different_work(slow, a, fast, b)
    for name, (figure, more_is_better) in _RATIOS.items():
        of_slow, of_fast = ([figure(side.samples) for side in sides] for sides in zip(*pairs, strict=True))
        found = metrics.ratio(*((of_fast, of_slow) if more_is_better else (of_slow, of_fast)))
        ratios[name] = None if why or found is None else asdict(found)
    return {
        "clients": clients,
        "rounds": len(pairs),
        "comparable": not why,
        "why": why,
        "ratios": ratios,
        "targets": {part.target.name: _figures(part.rounds[clients]) for part in (slow, fast)},
    }


def _figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """One target's figures over all rounds; rates are the median over the rounds."""
    pooled = metrics.summary([sample for part in rounds for sample in part.samples])
    for name, figure in (("tokens_per_s", metrics.token_rate), ("requests_per_s", metrics.request_rate)):
        pooled[name] = metrics.median([figure(part.samples) for part in rounds])
    return pooled | {
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
                said = (
                    sample.error or f"{sample.completion_tokens} of {sample.wanted} tokens ({sample.finish})"
                )
                return f"{part.target.name} did not finish prompt {sample.prompt}: {said}"
    read = [{s.prompt: (s.prompt_tokens, s.completion_tokens) for s in side.samples} for side in (a, b)]
    for prompt in sorted(read[0].keys() | read[1].keys()):
        counts = [side.get(prompt) for side in read]
        if counts[0] != counts[1]:
            return (
                f"prompt {prompt}: {slow.target.name} and {fast.target.name} counted "
                f"{counts[0]} and {counts[1]} (prompt, output) tokens"
            )
    return ""


def _warnings(made: dict[str, Any], measured: Sequence[Measured], noise: tuple[Noise, Noise]) -> list[str]:
    said = [
        f"the machine was not quiet {when}: {part.warning}"
        for when, part in zip(("before", "after"), noise, strict=True)
        if part.warning
    ]
    tokens, asked = made["settings"]["tokens"], made["settings"]["asked_tokens"]
    if tokens != asked:
        said.append(f"answers were shortened from {asked} to {tokens} tokens to stay within the time")
    if not made["together"]:
        said.append("memory did not hold both servers: they ran one after the other, not alternately")
    for case in made["cases"]:
        if case["why"]:
            said.append(f"{case['clients']} client(s): not compared: {case['why']}")
        if case["rounds"] == 1:
            said.append(f"{case['clients']} client(s): a single round, so the ratio has no spread")
    busy = max(part.idle for side in measured for rounds in side.rounds.values() for part in rounds)
    if busy > _IDLE_LIMIT:
        said.append(f"the server that should have been idle used {busy:.0%} of a processor")
    return said


def _quotient(a: float, b: float) -> float | None:
    return a / b if a and b else None


Row = tuple[str, str, str, str]


def sections(made: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """The table: sections of rows (what, baseline, edge, how many times better)."""
    slow, fast = made["targets"]
    found: list[tuple[str, list[Row]]] = []
    for case in made["cases"]:
        sides = [case["targets"][name] for name in (slow, fast)]
        rows: list[Row] = []
        for title, pick, ratio in (
            ("output tokens/s", lambda s: _number(s["tokens_per_s"]), "tokens_per_s"),
            ("first token, p50", lambda s: _time(s["ttft_s"]["p50"]), "ttft_s"),
            ("whole answer, p50", lambda s: _time(s["e2e_s"]["p50"]), "e2e_s"),
            ("whole answer, p95", lambda s: _time(s["e2e_s"]["p95"]), ""),
            ("/health meanwhile, p50", lambda s: _time(s["health_s"]["p50"]), ""),
            ("/health meanwhile, p99", lambda s: _time(s["health_s"]["p99"]), ""),
        ):
            better = ""
            if ratio:
                better = _ratio(case["ratios"][ratio]) if case["comparable"] else "not compared"
            rows.append((title, pick(sides[0]), pick(sides[1]), better))
        found.append(("1 client" if case["clients"] == 1 else f"{case['clients']} clients", rows))
    steady, peak, load = (
        [made["targets"][name][key] for name in (slow, fast)]
        for key in ("memory_steady", "memory_peak", "load_s")
    )
    less = made["memory_ratio"]
    process: list[Row] = [
        ("memory while serving", *map(_size, steady), f"{less:.1f} x" if less else ""),
        ("memory at its peak", *map(_size, peak), ""),
        ("from start to ready", *map(_time, load), ""),
    ]
    return [*found, ("process", process)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(bytes_: int) -> str:
    return f"{bytes_ / 2**20:,.0f} MiB" if bytes_ else "-"


def _ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    spread = f" ({found['low']:.1f} to {found['high']:.1f})" if found["pairs"] > 1 else ""
    return f"{found['value']:.1f} x{spread}"


def _titles(made: dict[str, Any]) -> tuple[str, str]:
    return f"baseline (transformers, {made['settings']['dtype']})", f"edge ({made['model']['gguf']['file']})"


def show(made: dict[str, Any], console: Console) -> None:
    """The table and the warnings on the terminal."""
    tokens = made["settings"]["tokens"]
    title = f"{made['model']['run']}: {tokens} output tokens an answer\n{' | '.join(_titles(made))}"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("")
    for name in ("baseline", "edge", "better by (rounds)"):
        table.add_column(name, justify="right")
    for name, rows in sections(made):
        table.add_section()
        table.add_row(f"[bold]{name}[/bold]")
        for row in rows:
            table.add_row(*map(escape, row))
    console.print(table)
    for warning in made["warnings"]:
        console.print(f"warning: {escape(warning)}", style="yellow")


def block(made: dict[str, Any]) -> str:
    """The Markdown table with the line that says where it comes from."""
    slow, fast = _titles(made)
    lines = [f"| | {slow} | {fast} | better by (rounds) |", "| --- | ---: | ---: | ---: |"]
    for name, rows in sections(made):
        lines.append(f"| **{name}** | | | |")
        lines += [f"| {' | '.join(row)} |" for row in rows]
    machine = made["machine"]
    lines += [
        "",
        f"{made['settings']['tokens']} greedy output tokens after the same prompts, "
        f"{' and '.join(str(case['rounds']) for case in made['cases'])} rounds; "
        f"{machine['cpu']}, {machine['threads']} cores; {made['created'][:10]}; `{made['command']}`. "
        "The baseline does not stream: its first token comes with its last.",
    ]
    if made["warnings"]:
        lines += ["", f"Beware: {'; '.join(made['warnings'])}."]
    return "\n".join(lines) + "\n"


def markdown(made: dict[str, Any]) -> str:
    """report.md."""
    machine, model = made["machine"], made["model"]
    noise = made["noise"]["before"]
    cards = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none"
    parts = [f"# {model['run']}: edge beside the slow baseline\n", block(made)]
    parts.append(
        "## What was measured\n\n"
        f"- base model {model['base_model']}; merged {_size(model['merged']['bytes'])} "
        f"(`{model['merged']['digest']}`); {model['gguf']['file']} {_size(model['gguf']['bytes'])} "
        f"(`{model['gguf']['digest']}`)\n"
        "- baseline: FastAPI with `model.generate` in the asynchronous handler; edge: the server of this "
        "project with its default settings, prompt lookup included (it gives the same tokens)\n"
        "- raw prompts of some 80 tokens, each asked once; compared only where both servers counted the same "
        "tokens in each prompt and answer\n"
        "- time to first token: from sending to the first piece of text; whole answer: from sending to its "
        "end; tokens/s: output tokens of all clients over the wall time of a round, median of the rounds\n"
        "- better by: the geometric mean of the rounds' ratios, with the smallest and the largest\n"
        "- memory: of the whole process tree, shared pages counted once (PSS, or USS where there is none)\n"
        "- `/health` is asked every 0.1 s, whether or not the last question was answered\n"
    )
    parts.append(
        "## Machine\n\n"
        f"- {machine['cpu']}, {machine['threads']} cores used, {machine['os']}, GPU: {cards}\n"
        f"- before: others used {noise['busy']:.0%} of the processors, jitter {noise['jitter']:.0%}\n"
        f"- {', '.join(f'{name} {version}' for name, version in made['versions'].items())}, "
        f"Python {machine['python']}\n"
        f"- {made['seconds']:.0f} s in all: `{made['command']}`\n"
    )
    return "\n".join(parts)


def headline(made: dict[str, Any]) -> dict[str, Any]:
    """What the last line on standard output says."""
    return {
        "run": made["model"]["run"],
        "dtype": made["settings"]["dtype"],
        "tokens": made["settings"]["tokens"],
        "memory_ratio": _round(made["memory_ratio"]),
        "cases": [
            {
                "clients": case["clients"],
                "comparable": case["comparable"],
                "tokens_per_s": {n: _round(side["tokens_per_s"]) for n, side in case["targets"].items()},
                "ratios": {n: _round(r["value"]) if r else None for n, r in case["ratios"].items()},
            }
            for case in made["cases"]
        ],
        "warnings": len(made["warnings"]),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def write(made: dict[str, Any], folder: Path) -> None:
    """report.json and report.md in `folder`, each replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    for name, content in (("report.json", text), ("report.md", markdown(made))):
        partial = folder / f".{name}.partial-{os.getpid()}"
        try:
            partial.write_text(content, encoding="utf-8")
            partial.replace(folder / name)
        finally:
            partial.unlink(missing_ok=True)
