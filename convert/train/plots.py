"""training_loss.png and training_eval_loss.png: the losses, and a smoothed line, as LLaMA-Factory has it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from edge.errors import UnavailableError


def check() -> None:
    """Raise UnavailableError where there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "plot_loss needs the package 'matplotlib'", "pip install -c constraints.txt '.[train]'"
        ) from error


def smoothed(values: list[float]) -> list[float]:
    """An exponential mean whose weight grows with the number of points, as LLaMA-Factory smooths."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    made: list[float] = []
    for value in values:
        made.append(value if not made else made[-1] * weight + (1 - weight) * value)
    return made


def draw(folder: Path, history: list[dict[str, Any]]) -> list[Path]:
    """One picture for each kind of loss with at least two points. Returns what was written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = []
    for key in ("loss", "eval_loss"):
        points = [(line["current_steps"], line[key]) for line in history if key in line]
        if len(points) < 2:
            continue
        steps, values = [point[0] for point in points], [point[1] for point in points]
        figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot(steps, values, color="#1f77b4", alpha=0.4, label=key)
        axes.plot(steps, smoothed(values), color="#1f77b4", label="smoothed")
        axes.set_xlabel("step")
        axes.set_ylabel(key)
        axes.legend()
        path = folder / f"training_{key}.png"
        figure.savefig(path)
        made.append(path)
    return made
