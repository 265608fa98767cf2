"""Loss curves: points of a training's log, what they warn of, and ECharts' options for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# A log has as many points as steps; a screen has fewer columns.
_MOST = 600
_SMOOTH = 0.9
# Steps before a curve says anything.
_FEW = 30


class Curve:
    """What is drawn of one training, by step."""

    def __init__(self, lines: Iterable[dict[str, Any]] = ()) -> None:
        self.loss: dict[int, float] = {}
        self.eval_loss: dict[int, float] = {}
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Take in a line of trainer_log.jsonl or of --progress json."""
        step = line.get("current_steps", line.get("step"))
        for name, points in (("loss", self.loss), ("eval_loss", self.eval_loss)):
            if isinstance(step, int) and isinstance(line.get(name), float | int):
                points[step] = float(line[name])

    @property
    def smooth(self) -> dict[int, float]:
        """The loss's moving average; the first steps weigh as much as there are."""
        total = weight = 0.0
        found = {}
        for step in sorted(self.loss):
            total = _SMOOTH * total + self.loss[step]
            weight = _SMOOTH * weight + 1
            found[step] = total / weight
        return found

    def warnings(self) -> list[str]:
        """What a beginner should look at, in the words of the table of texts."""
        smooth, evals = list(self.smooth.values()), [self.eval_loss[step] for step in sorted(self.eval_loss)]
        found = []
        if len(smooth) >= _FEW and max(self.loss[step] for step in sorted(self.loss)[-5:]) < 1e-3:
            found.append("The loss is almost zero: the model repeats the rows by heart.")
        elif len(smooth) >= _FEW and abs(smooth[-1] - smooth[len(smooth) // 2]) < 0.01 * smooth[-1]:
            found.append("The loss is flat: try a larger learning rate, or look at the data.")
        if len(evals) >= 3 and evals[-1] > evals[-2] > evals[-3]:
            found.append("The validation loss rises: the model learns the rows by heart. Stop earlier.")
        return found


def options(curves: dict[str, Curve], names: tuple[str, str, str]) -> dict[str, Any]:
    """ECharts' options. names: of the loss, its moving average and the validation loss, translated."""
    series: list[dict[str, Any]] = []
    for number, (run, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        for name, points, style in (
            (names[0], curve.loss, {"lineStyle": {"width": 1, "opacity": 0.5, "color": colour}}),
            (names[1], curve.smooth, {"lineStyle": {"width": 2, "color": colour}}),
            (
                names[2],
                curve.eval_loss,
                {"lineStyle": {"type": "dashed", "width": 2, "color": _EVAL if len(curves) == 1 else colour}},
            ),
        ):
            if points:
                dots = name == names[2]
                series.append(
                    {
                        "type": "line",
                        "name": f"{run}: {name}" if len(curves) > 1 else name,
                        "data": thinned(points),
                        "showSymbol": dots,
                        "itemStyle": {"color": style["lineStyle"]["color"]},
                        **style,
                    }
                )
    grey = {"color": "#888"}
    return {
        "animation": False,
        "aria": {"enabled": True},
        "grid": {"left": 50, "right": 16, "top": 40, "bottom": 28},
        "legend": {"type": "scroll", "top": 4, "textStyle": grey},
        "tooltip": {"trigger": "axis", "confine": True},
        "xAxis": {
            "type": "value",
            "minInterval": 1,
            "min": "dataMin",
            "max": "dataMax",
            "axisLabel": grey,
            "splitLine": {"show": False},
        },
        "yAxis": {
            "type": "value",
            "scale": True,
            "axisLabel": grey,
            "splitLine": {"lineStyle": {"opacity": 0.3}},
        },
        "series": series,
    }


_COLOURS = ("#2a78d6", "#d1682c", "#2f9e5b", "#8e5bd0", "#c2a021", "#1f9aa8")
_EVAL = "#d1682c"


def thinned(points: dict[int, float]) -> list[list[float]]:
    """The points in their order, at most _MOST of them and the last one."""
    order = sorted(points)
    every = max(1, -(-len(order) // _MOST))
    kept = order[::every] + ([order[-1]] if order and (len(order) - 1) % every else [])
    return [[step, round(points[step], 5)] for step in kept]
