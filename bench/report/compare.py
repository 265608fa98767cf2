"""`edge bench compare A.json B.json`: what changed between two reports, beyond noise.

Each figure's ratio B / A stands with its 95 % interval, from resampling both reports' own samples (bootstrap,
Efron 1979). It has changed where the interval does not hold 1; a report of another machine, model or answer
length is compared all the same, with a warning.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from bench.report import build
from edge.artefact import json_file
from edge.console import plain_table
from edge.errors import InputError

DRAWS = 2000
# Figure -> (its values in one target's part of a case, whether more is better).
_FIGURES: dict[str, tuple[Callable[[dict[str, Any]], list[float]], bool]] = {
    "tokens/s of a round": (lambda side: [rate for rate in side["rates"] if rate], True),
    "first token": (lambda side: [s["events"][0][0] for s in _good(side) if s["events"]], False),
    "whole answer": (lambda side: [s["end"] for s in _good(side)], False),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge bench compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args(argv)
    before, after = read(args.before), read(args.after)
    rows = compare(before, after)
    if not rows:
        raise InputError(
            "the two reports have no target and case in common", "measure the same targets and clients"
        )
    console = Console()
    cells = [
        [
            *(row[key] for key in ("case", "target", "figure")),
            f"{row['before']:.4g}",
            f"{row['after']:.4g}",
            f"{row['ratio']:.2f} x ({row['low']:.2f} to {row['high']:.2f})" if row["low"] else "-",
            row["verdict"],
        ]
        for row in rows
    ]
    columns = ("case", "target", "figure", "before", "after", "ratio (95 %)", "")
    console.print(plain_table(columns, cells, title=f"{args.after} against {args.before}", left=3))
    for text in differences(before, after):
        console.print(f"warning: {escape(text)}", style="yellow")
    sys.stdout.write(json.dumps({"rows": rows}, ensure_ascii=False) + "\n")
    return 0


def read(path: Path) -> dict[str, Any]:
    """A report. Raises InputError for a file that is none, or one of another schema."""
    report = json_file.read(path, required=True, hint="give RUN/report.json")
    if report.get("kind") != "bench":
        raise InputError(f"{path} is not a report of `edge bench`", "give RUN/report.json")
    # Schema 3 had energy too, which is not compared.
    if report.get("schema") not in (3, build.SCHEMA):
        raise InputError(
            f"{path} has schema {report.get('schema')}, this version reads 3 and {build.SCHEMA}",
            "measure again",
        )
    return report


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each figure of each target and case that both have; medians, in seconds or tokens/s."""
    old = {(c["workload"], c["clients"]): c for c in before["cases"]}
    rows = []
    for case in after["cases"]:
        key = (case["workload"], case["clients"])
        for name, side in case["targets"].items():
            if key not in old or name not in old[key]["targets"]:
                continue
            for figure, (values, more_is_better) in _FIGURES.items():
                a, b = values(old[key]["targets"][name]), values(side)
                if a and b:
                    row = {"case": f"{key[0]}, {key[1]}", "target": name, "figure": figure}
                    rows.append(row | judge(a, b, more_is_better=more_is_better))
    return rows


def judge(before: Sequence[float], after: Sequence[float], *, more_is_better: bool) -> dict[str, Any]:
    """Medians, their ratio with its interval, and better, worse or within noise.

    Fewer than three values on a side say nothing about noise: the interval is then missing.
    """
    a, b = np.asarray(before, float), np.asarray(after, float)
    ratio = float(np.median(b) / np.median(a))
    figures: dict[str, Any] = {
        "before": float(np.median(a)),
        "after": float(np.median(b)),
        "ratio": ratio,
        "low": None,
        "high": None,
    }
    if min(len(a), len(b)) < 3:
        return figures | {"verdict": "too few rounds"}
    rng = np.random.default_rng(0)
    drawn = [np.median(x[rng.integers(0, len(x), (DRAWS, len(x)))], axis=1) for x in (a, b)]
    low, high = (float(v) for v in np.percentile(drawn[1] / drawn[0], (2.5, 97.5)))
    verdict = "within noise"
    if not low <= 1.0 <= high:
        verdict = "better" if (ratio > 1.0) == more_is_better else "WORSE"
    return figures | {"low": low, "high": high, "verdict": verdict}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else differs between the reports, so that a change may not be the code's."""
    facts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "machine": lambda report: report["machine"]["cpu"],
        "number of cores": lambda report: report["machine"]["threads"],
        "answer length": lambda report: report["settings"]["tokens"],
        "GGUF": lambda report: report["model"]["gguf"]["digest"],
        "merged model": lambda report: report["model"]["merged"]["digest"],
    }
    return [
        f"another {name}: {fact(before)} before, {fact(after)} after"
        for name, fact in facts.items()
        if fact(before) != fact(after)
    ]


def _good(side: dict[str, Any]) -> list[dict[str, Any]]:
    return [s for part in side["samples"] for s in part if s["state"] == "ok"]
