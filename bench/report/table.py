"""A report as tables: on the terminal, in Markdown, and the files report.json, .md and .html."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.measure import metrics
from bench.report.definitions import DEFINITIONS

Row = tuple[str, list[str]]
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
    ("incomplete, failed", lambda s: _faults(s), ""),
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


def sections(made: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """The table: sections of rows (what, a cell for each target, with how many times better it is).

    A row that no target has anything for is left out.
    """
    found = [(case_title(made, case), _case(made, case)) for case in made["cases"]]
    return [*found, ("process", _process(made)), ("quality", _quality(made))]


def case_title(made: dict[str, Any], case: dict[str, Any]) -> str:
    clients = "1 client" if case["clients"] == 1 else f"{case['clients']} clients"
    return clients if len(made["workloads"]) == 1 else f"{case['workload']}, {clients}"


def _case(made: dict[str, Any], case: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for title, pick, ratio in _FIGURES:
        cells = [pick(case["targets"][name]) for name in made["targets"]]
        if set(cells) == {"-"}:
            continue
        for at, name in enumerate(made["targets"]):
            if ratio and name in case["against"]:
                cells[at] += _better(case["against"][name], ratio)
        rows.append((title, cells))
    return rows


def _process(made: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for title, key, show_ in _PROCESS:
        cells = [show_(side[key]) for side in made["targets"].values()]
        for at, (name, side) in enumerate(made["targets"].items()):
            if key == "memory_steady" and side["memory_ratio"] and name != made["reference"]:
                cells[at] += f" ({side['memory_ratio']:.1f} x)"
        if set(cells) != {"-"}:
            rows.append((title, cells))
    if made["sweeps"]:
        best = [max((s["goodput"] for s in made["sweeps"][name]), default=None) for name in made["targets"]]
        rows.append(("requests/s within the objective", [_number(value) for value in best]))
    return rows


def _quality(made: dict[str, Any]) -> list[Row]:
    sides = [side["quality"] for side in made["targets"].values()]
    of = next((f", {side['rows']}" for side in sides if side.get("rows")), "")
    rows: list[Row] = [
        ("weights", [_weights(made, side) for side in made["targets"].values()]),
        ("KL divergence, mean", [_lost(side, "kl", lambda v: f"{v:.2g}") for side in sides]),
        ("same top token", [_lost(side, "top1", lambda v: f"{v:.1%}") for side in sides]),
    ]
    if of:
        rows.append((f"perplexity{of}", [_perplexity(side) for side in sides]))
    return rows


def _weights(made: dict[str, Any], side: dict[str, Any]) -> str:
    known = made["model"].get(side["stage"])
    return f"{side['stage']}, {_size(known['bytes'])} of files" if known else "not known"


def _lost(quality: dict[str, Any], key: str, show_: Callable[[float], str]) -> str:
    if quality.get("reference"):
        return "the reference"
    return show_(quality[key]) if key in quality else "not measured" if quality else "-"


def _perplexity(quality: dict[str, Any]) -> str:
    return f"{quality['perplexity']:.3f}" if "perplexity" in quality else "-"


def _better(against: dict[str, Any], name: str) -> str:
    found = against["ratios"][name]
    if not against["comparable"] or found is None:
        return " (not compared)"
    spread = f", {found['low']:.1f} to {found['high']:.1f}" if found["pairs"] > 1 else ""
    return f" ({found['value']:.1f} x{spread})"


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


def _faults(side: dict[str, Any]) -> str:
    """Of how many answers; "-" where all were whole."""
    if side["complete"] == side["requests"]:
        return "-"
    return f"{side['incomplete']}, {side['errors']} of {side['requests']}"


def titles(made: dict[str, Any]) -> list[str]:
    """A column's title for each target: its name, and what it runs."""
    found = []
    for name, side in made["targets"].items():
        if side["stage"] == "merged":
            what = f" (transformers, {side['about'].get('dtype', '')})"
        else:
            known = made["model"].get(side["stage"])
            what = f" ({known['file']})" if known and name.startswith("edge") else ""
        found.append(name + what + (" (not forced)" if side["unforced"] else ""))
    return found


def show(made: dict[str, Any], console: Console) -> None:
    """The tables and the warnings on the terminal; a row a target where their columns would not fit."""
    title = escape(f"{made['model']['run']}: {made['settings']['tokens']} output tokens an answer")
    if FIRST_COLUMN + sum(COLUMN for _ in made["targets"]) <= max(console.width, 80):
        _show_columns(made, console, title)
    else:
        _show_rows(made, console, title)
    for warning in made["warnings"]:
        console.print(f"warning: {escape(warning)}", style="yellow")


def _show_columns(made: dict[str, Any], console: Console, title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in titles(made):
        table.add_column(escape(name), justify="right")
    for name, rows in sections(made):
        table.add_section()
        table.add_row(f"[bold]{escape(name)}[/bold]")
        for what, cells in rows:
            table.add_row(escape(what.replace("`", "")), *map(escape, cells))
    console.print(table)


def _show_rows(made: dict[str, Any], console: Console, title: str) -> None:
    """What decides, of each target: medians, the answer's p95, `/health`'s p99. report.md has the rest."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("tokens/s", "better by", "first", "answer", "p95", "/health"):
        table.add_column(heading, justify="right")
    for case in made["cases"]:
        table.add_section()
        table.add_row(f"[bold]{escape(case_title(made, case))}[/bold]")
        for name, side in case["targets"].items():
            against = case["against"].get(name)
            table.add_row(
                escape(name),
                _number(side["tokens_per_s"]),
                _better(against, "tokens_per_s").strip(" ()") if against else "",
                _time(side["ttft_s"]["p50"]),
                _time(side["e2e_s"]["p50"]),
                _time(side["e2e_s"]["p95"]),
                _time(side["health_s"]["p99"]),
            )
    console.print(table)
    rest = Table()
    rest.add_column("", no_wrap=True)
    for heading in ("memory", "ready after", "KL", "same top token"):
        rest.add_column(heading, justify="right")
    for name, side in made["targets"].items():
        rest.add_row(
            escape(name),
            _size(side["memory_steady"]),
            _time(side["load_s"] or None),
            _lost(side["quality"], "kl", lambda v: f"{v:.2g}"),
            _lost(side["quality"], "top1", lambda v: f"{v:.1%}"),
        )
    console.print(rest)


def block(made: dict[str, Any], *, brief: bool = False) -> str:
    """The Markdown table with the line that says where it comes from. brief: without the rows of _DETAILS."""
    columns = titles(made)
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, rows in sections(made):
        lines.append(f"| **{name}** |{' |' * len(columns)}")
        kept = [row for row in rows if not brief or row[0] not in _DETAILS]
        lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in kept]
    machine = made["machine"]
    lines += [
        "",
        f"{made['settings']['tokens']} greedy output tokens after the same prompts, "
        f"{' and '.join(str(case['rounds']) for case in made['cases'])} rounds; in brackets: how many times "
        f"better than {made['reference']}, with the least and the most of the rounds; "
        f"{machine['cpu']}, {machine['threads']} cores; {made['created'][:10]}; `{made['command']}`."
        + (
            " The baseline does not stream: its first token comes with its last."
            if any(name.startswith("baseline") for name in made["targets"])
            else ""
        ),
    ]
    if made["warnings"]:
        lines += ["", f"Beware: {'; '.join(made['warnings'])}."]
    return "\n".join(lines) + "\n"


_LATENCIES = (
    ("first token", "ttft_s"),
    ("between tokens", "itl_s"),
    ("per token", "tpot_s"),
    ("whole answer", "e2e_s"),
)


def latencies(made: dict[str, Any]) -> list[tuple[str, str, str, list[str]]]:
    """(case, target, what, its percentiles with their intervals); what has no values is left out."""
    found = []
    for case in made["cases"]:
        for name, side in case["targets"].items():
            for what, key in _LATENCIES:
                if side[key]["n"]:
                    cells = [_bounded(side[key], f"p{q}") for q in metrics.PERCENTILES]
                    found.append((case_title(made, case), name, what, cells))
    return found


def _bounded(figures: dict[str, Any], which: str) -> str:
    bounds = figures["intervals"][which]
    return _time(figures[which]) + (f" ({_time(bounds[0])} to {_time(bounds[1])})" if bounds else "")


def percentiles(made: dict[str, Any]) -> str:
    """`latencies` as a Markdown table."""
    heads = [f"p{q}" for q in metrics.PERCENTILES]
    lines = [f"| | | | {' | '.join(heads)} |", f"| --- | --- | --- |{' ---: |' * len(heads)}"]
    lines += [f"| {case} | {name} | {what} | {' | '.join(c)} |" for case, name, what, c in latencies(made)]
    return "\n".join(lines) + "\n"


def heading(made: dict[str, Any]) -> str:
    """The model's run, and who was measured."""
    *others, last = made["targets"]
    who = f"{', '.join(others)} and {last} side by side" if others else last
    return f"{made['model']['run']}: {who}"


def markdown(made: dict[str, Any]) -> str:
    """report.md."""
    machine, model = made["machine"], made["model"]
    noise = made["noise"]["before"]
    cards = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none"
    parts = [f"# {heading(made)}\n", block(made)]
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
    )
    parts += [f"## Percentiles, with 95 % intervals\n\n{percentiles(made)}"]
    words = "".join(f"- {name}: {text}\n" for name, text in DEFINITIONS.items())
    parts += [f"## What the figures mean\n\n{words}"]
    bandwidths = {f"{one['best'] / 1e9:.1f}" for one in made["memory"].values() if one}
    read = f"; memory read at {' and '.join(sorted(bandwidths))} GB/s" if bandwidths else ""
    parts.append(
        "## Machine\n\n"
        f"- {machine['cpu']}, {machine['threads']} cores used, {machine['os']}, GPU: {cards}{read}\n"
        f"- before: others used {noise['busy']:.0%} of the processors, jitter {noise['jitter']:.0%}\n"
        f"- {', '.join(f'{name} {version}' for name, version in made['versions'].items())}, "
        f"Python {machine['python']}\n"
        f"- {made['seconds']:.0f} s in all: `{made['command']}`\n"
    )
    return "\n".join(parts)


def write(made: dict[str, Any], page: str, folder: Path) -> None:
    """report.json, report.md and report.html (the text `page`) in `folder`, each replaced whole."""
    text = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    write_files({"report.json": text, "report.md": markdown(made), "report.html": page}, folder)


def write_files(files: Mapping[str, str], folder: Path) -> None:
    """Texts by name into `folder`, which is made; each replaced whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        partial = folder / f".{name}.partial-{os.getpid()}"
        try:
            partial.write_text(content, encoding="utf-8")
            partial.replace(folder / name)
        finally:
            partial.unlink(missing_ok=True)
