"""report.html: one self-contained page of a report, with charts; no script, nothing fetched."""

from __future__ import annotations

from html import escape
from typing import Any

from bench.report import grid, table
from bench.report.definitions import DEFINITIONS
from convert import svg_charts
from edge.machine import hardware

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; color: inherit; margin: 0.5rem 0 1.5rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
tr.section td { font-weight: 600; padding-top: 0.8rem; }
.warning { border-left: 4px solid #d55e00; padding-left: 0.6rem; }
code { background: #8882; padding: 0 0.25em; }
"""


def page(report: dict[str, Any]) -> str:
    """The whole page for a report of `bench.report.build`."""
    machine = report["machine"]
    parts = [
        f"<h1>{escape(table.heading(report))}</h1>",
        f"<p>{escape(hardware.processor(machine))}, {escape(report['created'][:10])}; "
        f"<code>{escape(report['command'])}</code></p>",
        *(f'<p class="warning">{escape(text)}</p>' for text in report["warnings"]),
        *pictures(report).values(),
        "<h2>Figures</h2>",
        grid.html(table.headings(report), table.rows(report)),
        "<h2>Percentiles, with 95 % intervals</h2>",
        grid.html(*table.latencies(report)),
        "<h2>What they mean</h2><ul>",
        *(f"<li>{escape(f'{name}: {text}').replace('`', '')}</li>" for name, text in DEFINITIONS.items()),
        *(f"<li>{escape(name)}: {escape(about)}</li>" for name, about in report["workloads"].items()),
        "</ul>",
        "<h2>Versions</h2><p>"
        + escape(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
        + f", Python {escape(machine['python'])}</p>",
    ]
    title = escape(f"{report['model']['run']}: measured")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def pictures(report: dict[str, Any]) -> dict[str, str]:
    """The report's charts as SVG, by name; those that have nothing to show are left out."""
    speeds = {
        table.case_title(report, case): {
            name: side["tokens_per_s"] or 0.0 for name, side in case["targets"].items()
        }
        for case in report["cases"]
    }
    charts = {
        "throughput": svg_charts.bars("Output tokens of all clients", "tokens/s", speeds),
        "load": svg_charts.lines(
            "Whole answer against load",
            "seconds, median",
            "clients at once",
            _by_clients(report),
            log_x=True,
            log_y=True,
        ),
        "first": svg_charts.lines(
            "Time to first token", "share of answers", "seconds", _shares(report), log_x=True, dots=False
        ),
        "ceiling": _ceilings(report),
        "trade": svg_charts.scatter(
            "Size, speed and quality", "tokens/s, 1 client", "MiB of weights", _trade(report), log_x=True
        ),
        "sweep": svg_charts.lines(
            "Within the objective",
            "share of requests",
            "requests/s that arrive",
            {n: [(s["rate"], s["share"]) for s in steps] for n, steps in report["sweeps"].items()},
        ),
    }
    return {name: svg for name, svg in charts.items() if svg}


def _by_clients(report: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """The first workload's median answer, by number of clients, where there are several numbers."""
    first = next(iter(report["workloads"]))
    cases = [case for case in report["cases"] if case["workload"] == first]
    if len(cases) < 2:
        return {}
    return {
        name: [
            (case["clients"], case["targets"][name]["e2e_s"]["p50"])
            for case in cases
            if case["targets"][name]["e2e_s"]["p50"]
        ]
        for name in report["targets"]
    }


def _shares(report: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Of the case with most clients: which share of answers had begun by when."""
    case = max(report["cases"], key=lambda c: c["clients"])
    return {name: _steps(side) for name, side in case["targets"].items()}


def _steps(side: dict[str, Any]) -> list[tuple[float, float]]:
    """The empirical distribution of the times to the first token, as the corners of its steps."""
    samples = [sample for part in side["samples"] for sample in part]
    values = sorted(s["events"][0][0] for s in samples if s["state"] == "ok" and s["events"])
    count = len(values)
    return [point for i, v in enumerate(values) for point in ((v, i / count), (v, (i + 1) / count))]


def _ceilings(report: dict[str, Any]) -> str:
    groups = {
        table.case_title(report, case): {
            name: 100 * side["ceiling"]["share"]
            for name, side in case["targets"].items()
            if side.get("ceiling")
        }
        for case in report["cases"]
    }
    groups = {label: group for label, group in groups.items() if group}
    title = "Decoding, of what the memory allows"
    return svg_charts.bars(title, "percent", groups, list(report["targets"])) if groups else ""


def _trade(report: dict[str, Any]) -> list[svg_charts.Point]:
    """Each target by the size of its weights' files and its speed with one client, and what they lost."""
    case = min(report["cases"], key=lambda c: c["clients"])
    points = []
    for index, (name, side) in enumerate(report["targets"].items()):
        files, speed = report["model"].get(side["stage"]), case["targets"][name]["tokens_per_s"]
        if case["clients"] == 1 and files and speed:
            lost = side["quality"]
            words = (
                ", reference" if lost.get("reference") else f", KL {lost['kl']:.2g}" if "kl" in lost else ""
            )
            points.append(svg_charts.Point(files["bytes"] / 2**20, speed, name + words, colour=index))
    return points
