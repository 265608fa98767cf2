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

from bench import metrics, prompts, roofline, sweep
from bench.metrics import Sample
from bench.probe import Noise
from bench.roofline import Bandwidth
from edge import hardware, manifest
from edge.gguf_header import GGUFHeader

if TYPE_CHECKING:
    from bench.run import Case, Measured, Plan, Round

SCHEMA = 2
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
    memory: Bandwidth | None,
    header: GGUFHeader | None,
    sweeps: dict[str, list[dict[str, Any]]],
    together: bool,
    seconds: float,
) -> dict[str, Any]:
    """The report: plain data, times in seconds, sizes in bytes. The first of `measured` is the reference.

    plan: what was kept of what was asked for; asked_tokens: the answers' length before it was shortened.
    memory, header: for the ceiling of decoding; None leaves it out. sweeps: of each target, see bench.sweep.
    """
    made = {
        "schema": SCHEMA,
        "kind": "bench",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "seconds": round(seconds, 1),
        "model": model,
        "settings": asdict(plan) | {"asked_tokens": asked_tokens},
        "workloads": {name: prompts.WORKLOADS[name].about for name in plan.workloads},
        "together": together,
        "machine": hardware.describe(),
        "versions": manifest.versions(*_PACKAGES),
        "noise": {"before": asdict(noise[0]), "after": asdict(noise[1])},
        "memory": asdict(memory) if memory else None,
        "reference": measured[0].target.name,
        "targets": {part.target.name: _target(part, measured[0]) for part in measured},
        "cases": [
            _case((name, clients), measured, memory, header)
            for name in plan.workloads
            for clients in plan.clients
        ],
        "sweeps": sweeps,
        "warnings": [],
    }
    made["warnings"] = _warnings(made, measured, noise)
    return made


def _target(part: Measured, reference: Measured) -> dict[str, Any]:
    return {
        # The interpreter's own path says nothing to another reader.
        "command": ["python", *part.target.command[1:]],
        "load_s": round(part.load_s, 2),
        "memory_peak": part.memory_peak,
        "memory_steady": part.memory_steady,
        "memory_ratio": _quotient(reference.memory_steady, part.memory_steady),
        "about": part.about,
    }


def _case(
    case: Case, measured: Sequence[Measured], memory: Bandwidth | None, header: GGUFHeader | None
) -> dict[str, Any]:
    reference = measured[0]
    targets = {}
    for part in measured:
        figures = _figures(part.rounds[case])
        if memory is not None and header is not None and part.target.reads_gguf:
            figures["ceiling"] = _ceiling(figures, part.rounds[case], memory, header)
        targets[part.target.name] = figures
    return {
        "workload": case[0],
        "clients": case[1],
        "rounds": len(reference.rounds[case]),
        "targets": targets,
        "against": {part.target.name: _against(case, reference, part) for part in measured[1:]},
    }


def _against(case: Case, reference: Measured, part: Measured) -> dict[str, Any]:
    """How many times better `part` is than the reference, round by round; or why that cannot be said."""
    pairs = list(zip(reference.rounds[case], part.rounds[case], strict=True))
    why = next((said for a, b in pairs if (said := different_work(reference, a, part, b))), "")
    ratios: dict[str, Any] = {}
    for name, (figure, more_is_better) in _RATIOS.items():
        theirs, own = ([figure(side.samples) for side in sides] for sides in zip(*pairs, strict=True))
        found = metrics.ratio(*((own, theirs) if more_is_better else (theirs, own)))
        ratios[name] = None if why or found is None else asdict(found)
    return {"comparable": not why, "why": why, "ratios": ratios}


def _ceiling(
    figures: dict[str, Any], rounds: Sequence[Round], memory: Bandwidth, header: GGUFHeader
) -> dict[str, Any] | None:
    """What the memory allows one stream, and the share of it that decoding reached (one client alone)."""
    samples = metrics.complete([sample for part in rounds for sample in part.samples])
    each = figures["tpot_s"]["p50"]
    if not samples or not each or len({sample.client for sample in samples}) > 1:
        return None
    read = [sample.prompt_tokens or 0 for sample in samples]
    per_token = roofline.bytes_per_token(header, roofline.context_of(read, samples[0].wanted))
    most = roofline.ceiling(memory, per_token)
    return {"bytes_per_token": per_token, "tokens_per_s": most, "share": 1.0 / each / most}


def _figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """One target's figures over all rounds; rates are the median over the rounds."""
    samples = [sample for part in rounds for sample in part.samples]
    pooled = metrics.summary(samples)
    rates = [metrics.token_rate(part.samples) for part in rounds]
    pooled["tokens_per_s"] = metrics.median(rates)
    pooled["requests_per_s"] = metrics.median([metrics.request_rate(part.samples) for part in rounds])
    made = sum(sample.completion_tokens or 0 for sample in metrics.complete(samples))
    return pooled | {
        "rates": rates,
        "tokens_per_s_interval": metrics.interval(rates),
        "cpu_s_per_token": _quotient(sum(part.cpu for part in rounds), made),
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
        said.append("memory did not hold all servers: they ran one after the other, not alternately")
    for case in made["cases"]:
        name = f"{case['workload']}, {case['clients']} client(s)"
        said += [f"{name}: not compared: {a['why']}" for a in case["against"].values() if a["why"]]
        if case["rounds"] == 1:
            said.append(f"{name}: a single round, so the ratio has no spread")
    busy = max(part.idle for side in measured for rounds in side.rounds.values() for part in rounds)
    if busy > _IDLE_LIMIT:
        said.append(f"the server that should have been idle used {busy:.0%} of a processor")
    return said


def _quotient(a: float, b: float) -> float | None:
    return a / b if a and b else None


Row = tuple[str, list[str]]


def sections(made: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """The table: sections of rows (what, a cell for each target, with how many times better it is)."""
    names = list(made["targets"])
    found: list[tuple[str, list[Row]]] = []
    for case in made["cases"]:
        sides = [case["targets"][name] for name in names]
        rows: list[Row] = []
        for title, pick, ratio in (
            ("output tokens/s", lambda s: _number(s["tokens_per_s"]), "tokens_per_s"),
            ("first token, p50", lambda s: _time(s["ttft_s"]["p50"]), "ttft_s"),
            ("whole answer, p50", lambda s: _time(s["e2e_s"]["p50"]), "e2e_s"),
            ("whole answer, p95", lambda s: _time(s["e2e_s"]["p95"]), ""),
            ("between tokens, p95", lambda s: _time(s["itl_s"]["p95"]), ""),
            ("`/health` meanwhile, p50", lambda s: _time(s["health_s"]["p50"]), ""),
            ("`/health` meanwhile, p99", lambda s: _time(s["health_s"]["p99"]), ""),
            ("processor time a token", lambda s: _time(s["cpu_s_per_token"]), ""),
            ("of what the memory allows", lambda s: _share(s.get("ceiling")), ""),
        ):
            cells = [pick(side) for side in sides]
            if set(cells) == {"-"}:
                continue
            for at, name in enumerate(names):
                if ratio and name in case["against"]:
                    cells[at] += _better(case["against"][name], ratio)
            rows.append((title, cells))
        clients = "1 client" if case["clients"] == 1 else f"{case['clients']} clients"
        found.append((clients if len(made["workloads"]) == 1 else f"{case['workload']}, {clients}", rows))
    process: list[Row] = []
    for title, key, show_ in (
        ("memory while serving", "memory_steady", _size),
        ("memory at its peak", "memory_peak", _size),
        ("from start to ready", "load_s", _time),
    ):
        cells = [show_(made["targets"][name][key]) for name in names]
        for at, name in enumerate(names):
            less = made["targets"][name]["memory_ratio"]
            if key == "memory_steady" and less and name != made["reference"]:
                cells[at] += f" ({less:.1f} x)"
        process.append((title, cells))
    if made["sweeps"]:
        best = [max((s["goodput"] for s in made["sweeps"][name]), default=None) for name in names]
        process.append(("requests/s within the objective", [_number(value) for value in best]))
    return [*found, ("process", process)]


def _better(against: dict[str, Any], name: str) -> str:
    found = against["ratios"][name]
    if not against["comparable"] or found is None:
        return " (not compared)"
    spread = f", {found['low']:.1f} to {found['high']:.1f}" if found["pairs"] > 1 else ""
    return f" ({found['value']:.1f} x{spread})"


def _share(ceiling: dict[str, Any] | None) -> str:
    return "-" if ceiling is None else f"{ceiling['share']:.0%} of {ceiling['tokens_per_s']:.0f} tok/s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(bytes_: int) -> str:
    return f"{bytes_ / 2**20:,.0f} MiB" if bytes_ else "-"


def titles(made: dict[str, Any]) -> list[str]:
    """A column's title for each target: its name, and what it runs."""
    found = []
    for name in made["targets"]:
        if name.startswith("baseline"):
            found.append(f"{name} (transformers, {made['targets'][name]['about'].get('dtype', '')})")
        elif name == "edge":
            found.append(f"edge ({made['model']['gguf']['file']})")
        elif name == "edge-onnx":
            found.append(f"edge-onnx ({made['targets'][name]['about']['file']})")
        else:
            found.append(name)
    return found


def show(made: dict[str, Any], console: Console) -> None:
    """The table and the warnings on the terminal."""
    tokens = made["settings"]["tokens"]
    table = Table(
        title=escape(f"{made['model']['run']}: {tokens} output tokens an answer"), title_justify="left"
    )
    table.add_column("")
    for title in titles(made):
        table.add_column(escape(title), justify="right")
    for name, rows in sections(made):
        table.add_section()
        table.add_row(f"[bold]{escape(name)}[/bold]")
        for title, cells in rows:
            table.add_row(escape(title.replace("`", "")), *map(escape, cells))
    console.print(table)
    for warning in made["warnings"]:
        console.print(f"warning: {escape(warning)}", style="yellow")


def block(made: dict[str, Any]) -> str:
    """The Markdown table with the line that says where it comes from."""
    columns = titles(made)
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, rows in sections(made):
        lines.append(f"| **{name}** |{' |' * len(columns)}")
        lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows]
    machine = made["machine"]
    lines += [
        "",
        f"{made['settings']['tokens']} greedy output tokens after the same prompts, "
        f"{' and '.join(str(case['rounds']) for case in made['cases'])} rounds; in brackets: how many times "
        f"better than {made['reference']}, with the least and the most of the rounds; "
        f"{machine['cpu']}, {machine['threads']} cores; {made['created'][:10]}; `{made['command']}`. "
        "The baseline does not stream: its first token comes with its last.",
    ]
    if made["warnings"]:
        lines += ["", f"Beware: {'; '.join(made['warnings'])}."]
    return "\n".join(lines) + "\n"


DEFINITIONS = (
    "time to first token: from sending the request to the first piece of text",
    "whole answer: from sending to its end; between tokens: the gap between two pieces of text",
    "tokens/s: output tokens of all clients over the wall time of a round, median of the rounds",
    "better by: the geometric mean of the rounds' ratios, with the smallest and the largest",
    "memory: of the whole process tree, shared pages counted once (PSS, or USS where there is none)",
    f"requests/s within the objective: the most that arrived at random times (Poisson) and had their first "
    f"token within {sweep.OBJECTIVE.ttft:g} s and each later one within {sweep.OBJECTIVE.tpot:g} s",
    "`/health` is asked every 0.1 s, whether or not the last question was answered",
    "what the memory allows: its best read bandwidth, measured before, at the model's size and with the "
    "threads that serve it, over the bytes that one token reads (all weights once, and the KV cells)",
)


def markdown(made: dict[str, Any]) -> str:
    """report.md."""
    machine, model = made["machine"], made["model"]
    noise = made["noise"]["before"]
    cards = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none"
    parts = [f"# {model['run']}: {' beside '.join(reversed(made['targets']))}\n", block(made)]
    workloads = "".join(f"- {name}: {about}\n" for name, about in made["workloads"].items())
    parts.append(
        "## What was measured\n\n"
        f"- base model {model['base_model']}; merged {_size(model['merged']['bytes'])} "
        f"(`{model['merged']['digest']}`); {model['gguf']['file']} {_size(model['gguf']['bytes'])} "
        f"(`{model['gguf']['digest']}`)\n"
        "- baseline: FastAPI with `model.generate` in the asynchronous handler; edge: the server of this "
        "project with its default settings, prefix reuse and prompt lookup only in the workloads that are "
        "about them\n"
        f"{workloads}"
        "- compared only where both servers counted the same tokens in each prompt and answer\n"
        + "".join(f"- {text}\n" for text in DEFINITIONS)
    )
    bandwidth = made["memory"]
    read = f"; memory read at {bandwidth['best'] / 1e9:.1f} GB/s" if bandwidth else ""
    parts.append(
        "## Machine\n\n"
        f"- {machine['cpu']}, {machine['threads']} cores used, {machine['os']}, GPU: {cards}{read}\n"
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
        "tokens": made["settings"]["tokens"],
        "reference": made["reference"],
        "memory_ratio": {
            name: _round(side["memory_ratio"])
            for name, side in made["targets"].items()
            if name != made["reference"]
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
            for case in made["cases"]
        ],
        "warnings": len(made["warnings"]),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def write(made: dict[str, Any], page: str, folder: Path) -> None:
    """report.json, report.md and report.html (the text `page`) in `folder`, each replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    for name, content in (
        ("report.json", text),
        ("report.md", markdown(made)),
        ("report.html", page),
    ):
        partial = folder / f".{name}.partial-{os.getpid()}"
        try:
            partial.write_text(content, encoding="utf-8")
            partial.replace(folder / name)
        finally:
            partial.unlink(missing_ok=True)
