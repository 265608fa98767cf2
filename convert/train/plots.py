"""training_loss.svg and training_eval_loss.svg: the losses, with a line smoothed as in LLaMA-Factory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert import svg_charts


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average; its weight grows with the number of points, as in LLaMA-Factory."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    means: list[float] = []
    for value in values:
        means.append(weight * means[-1] + (1 - weight) * value if means else value)
    return means


def draw(folder: Path, history: list[dict[str, Any]]) -> list[Path]:
    """Write one picture for each kind of loss that has at least two points; returns their paths."""
    paths = []
    for key in ("loss", "eval_loss"):
        points = [(line["current_steps"], line[key]) for line in history if key in line]
        if len(points) < 2:
            continue
        steps, values = zip(*points, strict=True)
        series = {key: points, "smoothed": list(zip(steps, smoothed(values), strict=True))}
        paths.append(folder / f"training_{key}.svg")
        svg = svg_charts.lines(folder.resolve().name, key, "step", series, dots=False, faint=[key])
        paths[-1].write_text(svg, encoding="utf-8")
    return paths
