"""A report as tables: on the terminal, in Markdown, and the files report.json, .md and .html."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bench.measure import metrics
from bench.report import grid
from bench.report.definitions import DEFINITIONS
from edge.artefact import json_file
from edge.console import plain_table
from edge.machine import hardware

# Characters that the terminal's table needs, for what and for each target.
FIRST_COLUMN, COLUMN = 28, 26


# Of a case: title, figure of one target, and the ratio that stands beside it.
_FIGURES: tuple[tuple[str, Callable[[dict[str, Any]], str], str], ...] = (
    ("output tokens/s", lambda s: _number(s["tokens_per_s"]), "tokens_per_s"),
    ("total tokens/s", lambda s: _number(s["total_tokens_per_s"]), ""),
    ("requests/s", lambda s: _number(s["requests_per_s"], 2), ""),
    ("goodput", lambda s: f"{_number(s['goodput'], 2)} ({s['goodput_share']:.0%})", ""),
    ("first token, p50", lambda s: _time(s["ttft_s"]["p50"]), "ttft_s"),
    ("whole answer, p50", lambda s: _time(s["e2e_s"]["p50"]), "e2e_s"),
    ("whole answer, p95", lambda s: _time(s["e2e_s"]["p95"]), ""),
    ("per token, p50", lambda s: _time(s["tpot_s"]["p50"]), ""),
    ("between tokens, p95", lambda s: _time(s["itl_s"]["p95"]), ""),
    ("`/health` meanwhile, p50", lambda s: _time(s["health_s"]["p50"]), ""),
    ("`/health` meanwhile, p99", lambda s: _time(s["health_s"]["p99"]), ""),
    ("processor time a token", lambda s: _time(s["cpu_s_per_token"]), ""),
    ("of what the memory allows", lambda s: _share(s.get("ceiling")), ""),
    ("incomplete, failed", lambda s: _incomplete(s), ""),
)
# What a reader of the project's front page can do without.
_DETAILS = {"total tokens/s", "requests/s", "goodput", "per token, p50", "from start to first answer"}
_PROCESS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("memory while serving", "memory_steady", lambda v: _size(v)),
    ("memory at its peak", "memory_peak", lambda v: _size(v)),
    ("GPU memory", "gpu_memory", lambda v: _size(v)),
    ("from start to first answer", "answers_s", lambda v: _time(v or None)),
    ("from start to ready", "load_s", lambda v: _time(v or None)),
)
_LATENCIES = {
    "first token": "ttft_s",
    "between tokens": "itl_s",
    "per token": "tpot_s",
    "whole answer": "e2e_s",
}


def rows(report: dict[str, Any], *, brief: bool = False) -> list[list[str]]:
    """The table: titles of sections; and what, then a cell for each target, with how many times better it is.

    A row that no target has anything for is left out; so are those of _DETAILS where `brief`.
    """
    table: list[list[str]] = []
    for case in report["cases"]:
        table.append([case_title(report, case)])
        for what, figure, ratio in _FIGURES:
            cells = {name: figure(case["targets"][name]) for name in report["targets"]}
            if ratio and set(cells.values()) != {"-"}:
                cells |= {
                    name: cells[name] + _better(case["against"][name], ratio) for name in case["against"]
                }
            table.append([what, *cells.values()])
    table += [["process"], *_process(report), ["quality"], *_quality(report)]
    return [row for row in table if set(row[1:]) != {"-"} and not (brief and row[0] in _DETAILS)]


def case_title(report: dict[str, Any], case: dict[str, Any]) -> str:
    clients = "1 client" if case["clients"] == 1 else f"{case['clients']} clients"
    return clients if len(report["workloads"]) == 1 else f"{case['workload']}, {clients}"


def _process(report: dict[str, Any]) -> list[list[str]]:
    table = []
    for what, key, form in _PROCESS:
        cells = {name: form(side[key]) for name, side in report["targets"].items()}
        for name, side in report["targets"].items():
            if key == "memory_steady" and side["memory_ratio"] and name != report["reference"]:
                cells[name] += f" ({side['memory_ratio']:.1f} x)"
        table.append([what, *cells.values()])
    if report["sweeps"]:
        sweeps = [report["sweeps"][name] for name in report["targets"]]
        best = [_number(max((step["goodput"] for step in steps), default=None)) for steps in sweeps]
        table.append(["requests/s within the objective", *best])
    return table


def _quality(report: dict[str, Any]) -> list[list[str]]:
    sides = [side["quality"] for side in report["targets"].values()]
    source = next((f", {side['rows']}" for side in sides if side.get("rows")), "")
    perplexities = [f"{side['perplexity']:.3f}" if "perplexity" in side else "-" for side in sides]
    return [
        ["weights", *(_weights(report, side) for side in report["targets"].values())],
        ["KL divergence, mean", *(_lost(side, "kl", "{:.2g}") for side in sides)],
        ["same top token", *(_lost(side, "top1", "{:.1%}") for side in sides)],
        [f"perplexity{source}", *perplexities],
    ]


def _weights(report: dict[str, Any], side: dict[str, Any]) -> str:
    files = report["model"].get(side["stage"])
    return f"{side['stage']}, {_size(files['bytes'])} of files" if files else "not known"


def _lost(quality: dict[str, Any], key: str, form: str) -> str:
    if quality.get("reference"):
        return "the reference"
    return form.format(quality[key]) if key in quality else "not measured" if quality else "-"


def _better(against: dict[str, Any], name: str) -> str:
    ratio = against["ratios"][name]
    if not against["comparable"] or ratio is None:
        return " (not compared)"
    spread = f", {ratio['low']:.1f} to {ratio['high']:.1f}" if ratio["pairs"] > 1 else ""
    return f" ({ratio['value']:.1f} x{spread})"


def _share(ceiling: dict[str, Any] | None) -> str:
    return "-" if ceiling is None else f"{ceiling['share']:.0%} of {ceiling['tokens_per_s']:.0f} tok/s"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(bytes_: int | None) -> str:
    return f"{bytes_ / 2**20:,.0f} MiB" if bytes_ else "-"


def _incomplete(side: dict[str, Any]) -> str:
    """Of how many answers; "-" where all were whole."""
    counts = f"{side['incomplete']}, {side['errors']} of {side['requests']}"
    return "-" if side["complete"] == side["requests"] else counts


def headings(report: dict[str, Any]) -> list[str]:
    """The title of the first column, and of each target's: its name, and what it runs."""
    titles = [""]
    for name, side in report["targets"].items():
        what, files = "", report["model"].get(side["stage"])
        if side["stage"] == "merged":
            what = f" (transformers, {side['about'].get('dtype', '')})"
        elif files and name.startswith("edge"):
            what = f" ({files['file']})"
        titles.append(name + what + (" (not forced)" if side["unforced"] else ""))
    return titles


def show(report: dict[str, Any], console: Console) -> None:
    """The tables and the warnings on the terminal; a row a target where their columns would not fit."""
    title = f"{report['model']['run']}: {report['settings']['tokens']} output tokens an answer"
    if FIRST_COLUMN + COLUMN * len(report["targets"]) <= max(console.width, 80):
        console.print(plain_table(headings(report), rows(report), title=title))
    else:
        _show_by_target(report, console, title)
    for warning in report["warnings"]:
        console.print(f"warning: {escape(warning)}", style="yellow")


def _show_by_target(report: dict[str, Any], console: Console, title: str) -> None:
    """What decides, of each target: medians, the answer's p95, `/health`'s p99. report.md has the rest."""
    table = []
    for case in report["cases"]:
        table.append([case_title(report, case)])
        for name, side in case["targets"].items():
            against = case["against"].get(name)
            better = _better(against, "tokens_per_s").strip(" ()") if against else ""
            table.append(
                [
                    name,
                    _number(side["tokens_per_s"]),
                    better,
                    _time(side["ttft_s"]["p50"]),
                    _time(side["e2e_s"]["p50"]),
                    _time(side["e2e_s"]["p95"]),
                    _time(side["health_s"]["p99"]),
                ]
            )
    columns = ["", "tokens/s", "better by", "first", "answer", "p95", "/health"]
    console.print(plain_table(columns, table, title=title))
    table = [
        [
            name,
            _size(side["memory_steady"]),
            _time(side["load_s"] or None),
            _lost(side["quality"], "kl", "{:.2g}"),
            _lost(side["quality"], "top1", "{:.1%}"),
        ]
        for name, side in report["targets"].items()
    ]
    console.print(plain_table(["", "memory", "ready after", "KL", "same top token"], table))


def block(report: dict[str, Any], *, brief: bool = False) -> str:
    """The Markdown table with the line that says where it comes from. brief: without the rows of _DETAILS."""
    machine = report["machine"]
    text = grid.markdown(headings(report), rows(report, brief=brief))
    text += (
        f"\n{report['settings']['tokens']} greedy output tokens after the same prompts, "
        f"{' and '.join(str(case['rounds']) for case in report['cases'])} rounds; in brackets: how many "
        f"times better than {report['reference']}, with the least and the most of the rounds; "
        f"{hardware.processor(machine)}; {report['created'][:10]}; `{report['command']}`."
    )
    if any(name.startswith("baseline") for name in report["targets"]):
        text += " The baseline does not stream: its first token comes with its last."
    if report["warnings"]:
        text += f"\n\nBeware: {'; '.join(report['warnings'])}."
    return text + "\n"


def latencies(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of case, target, what and its percentiles with their intervals)."""
    table = []
    for case in report["cases"]:
        for name, side in case["targets"].items():
            for what, key in _LATENCIES.items():
                if side[key]["n"]:
                    cells = [_bounded(side[key], f"p{q}") for q in metrics.PERCENTILES]
                    table.append([case_title(report, case), name, what, *cells])
    return ["", "", "", *(f"p{q}" for q in metrics.PERCENTILES)], table


def _bounded(figures: dict[str, Any], which: str) -> str:
    bounds = figures["intervals"][which]
    return _time(figures[which]) + (f" ({_time(bounds[0])} to {_time(bounds[1])})" if bounds else "")


def heading(report: dict[str, Any]) -> str:
    """The model's run, and who was measured."""
    *others, last = report["targets"]
    who = f"{', '.join(others)} and {last} side by side" if others else last
    return f"{report['model']['run']}: {who}"


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    machine, model, noise = report["machine"], report["model"], report["noise"]["before"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none"
    columns, percentiles = latencies(report)
    bandwidths = {f"{memory['best'] / 1e9:.1f}" for memory in report["memory"].values() if memory}
    read = f"; memory read at {' and '.join(sorted(bandwidths))} GB/s" if bandwidths else ""
    return "\n".join(
        [
            f"# {heading(report)}\n",
            block(report),
            "## What was measured\n\n"
            f"- base model {model['base_model']}; merged {_size(model['merged']['bytes'])} "
            f"(`{model['merged']['digest']}`); {model['gguf']['file']} {_size(model['gguf']['bytes'])} "
            f"(`{model['gguf']['digest']}`)\n"
            "- baseline: FastAPI with `model.generate` in the asynchronous handler; edge: the server of this "
            "project with its default settings, prefix reuse and prompt lookup only in the workloads that "
            "are about them\n"
            + "".join(f"- {name}: {about}\n" for name, about in report["workloads"].items())
            + "- compared only where both servers counted the same tokens in each prompt and answer\n",
            f"## Percentiles, with 95 % intervals\n\n{grid.markdown(columns, percentiles, left=3)}",
            "## What the figures mean\n\n"
            + "".join(f"- {name}: {text}\n" for name, text in DEFINITIONS.items()),
            "## Machine\n\n"
            f"- {hardware.processor(machine)}, {machine['os']}, GPU: {gpus}{read}\n"
            f"- before: others used {noise['busy']:.0%} of the processors, jitter {noise['jitter']:.0%}\n"
            f"- {', '.join(f'{name} {version}' for name, version in report['versions'].items())}, "
            f"Python {machine['python']}\n"
            f"- {report['seconds']:.0f} s in all: `{report['command']}`\n",
        ]
    )


def write_files(files: Mapping[str, str], folder: Path, *, keep: bool = True) -> str:
    """Texts by name into `folder`, which is made; each replaced whole or not at all.

    keep: where the first of them is there already, all get the time at which it was written into their names
    first. Returns this time, as in report-20261127-101500.json, or "" where there was none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first, stamp = folder / next(iter(files)), ""
    if keep and first.is_file():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(first.stat().st_mtime))
    for name, content in files.items():
        target = folder / name
        if stamp and target.is_file():
            target.replace(target.with_stem(f"{target.stem}-{stamp}"))
        json_file.write_text(target, content)
    return stamp


def write(report: dict[str, Any], page: str, folder: Path) -> str:
    """report.json, report.md and report.html (the text `page`) in `folder`; as `write_files`."""
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    return write_files({"report.json": text, "report.md": markdown(report), "report.html": page}, folder)
