"""Charts as SVG text, without a library: bars, and lines over a linear or logarithmic axis.

They stand alone (a file, or inside a page), take the text's colour from where they are shown, and say their
values in words to those who do not see them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 34, 58
# Distinguishable without red-green vision (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`. log: logarithmic; both ends are then positive."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where `value` lies, 0 to 1."""
        if self.log:
            span = math.log(self.high / self.low)
            return math.log(max(value, self.low) / self.low) / span if span else 0.5
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def ticks(self) -> list[float]:
        """Round numbers: powers of ten (with 2 and 5 between few of them), or about five steps."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            return [value for value in found if self.low <= value * 1.0001 and value <= self.high * 1.0001]
        size = self.high - self.low
        if size <= 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(size / 4))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= size / 5)
        count = math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9) + 1
        return [(math.ceil(self.low / step - 1e-9) + i) * step for i in range(count)]


def number(value: float) -> str:
    """Three digits that count, without an exponent for everyday sizes."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def bars(title: str, unit: str, groups: Mapping[str, Mapping[str, float]], series: Sequence[str] = ()) -> str:
    """Grouped bars from zero. groups: group -> series -> value; a series may lack a group.

    series: all names in the order of their colours, also those that are not drawn here.
    """
    names = list(series or dict.fromkeys(name for group in groups.values() for name in group))
    high = max((value for group in groups.values() for value in group.values()), default=0.0) or 1.0
    axis = Axis(0.0, high * 1.12)
    wide = (WIDTH - LEFT - RIGHT) / max(len(groups), 1)
    each = min(wide * 0.8 / max(len(names), 1), 64.0)
    parts = []
    for at, (label, group) in enumerate(groups.items()):
        middle = LEFT + wide * (at + 0.5)
        begin = middle - each * len(names) / 2
        for place, name in enumerate(names):
            if name in group:
                top = _y(axis.at(group[name]))
                x = begin + each * place
                parts.append(
                    f'<rect x="{x + 1:.1f}" y="{top:.1f}" width="{each - 2:.1f}" '
                    f'height="{HEIGHT - BOTTOM - top:.1f}" fill="{COLOURS[place % len(COLOURS)]}"/>'
                )
                parts.append(_text(x + each / 2, top - 4, number(group[name]), "middle"))
        parts.append(_text(middle, HEIGHT - BOTTOM + 16, label, "middle"))
    said = "; ".join(
        f"{label}: " + ", ".join(f"{name} {number(value)}" for name, value in group.items())
        for label, group in groups.items()
    )
    return _frame(title, unit, said, axis, names, parts)


def lines(
    title: str,
    unit: str,
    across: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    log_x: bool = False,
    log_y: bool = False,
    dots: bool = True,
) -> str:
    """Lines through points (x, y), in order of x. across: what x is. Nothing drawable gives an empty text."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_axis = Axis(min(xs), max(xs), log_x and min(xs) > 0)
    y_axis = Axis(min(ys) if log_y else 0.0, max(ys) * (1.0 if log_y else 1.08), log_y and min(ys) > 0)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x_axis.at(x) * (WIDTH - LEFT - RIGHT), _y(y_axis.at(y))

    parts = []
    for tick in x_axis.ticks():
        x, _ = place(tick, ys[0])
        parts.append(_text(x, HEIGHT - BOTTOM + 16, number(tick), "middle"))
    for at, line in enumerate(series.values()):
        colour = COLOURS[at % len(COLOURS)]
        spots = [place(*point) for point in sorted(line)]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in spots]
    parts.append(_text(WIDTH - RIGHT, HEIGHT - BOTTOM + 30, across, "end"))
    said = "; ".join(
        f"{name}: from {number(min(y for _, y in line))} to {number(max(y for _, y in line))}"
        for name, line in series.items()
        if line
    )
    return _frame(title, unit, said, y_axis, list(series), parts)


def scatter(
    title: str, unit: str, across: str, points: Mapping[str, tuple[float, float, str]], *, log_x: bool = False
) -> str:
    """Named points (x, y, words beside it), y from zero. Nothing to draw gives an empty text."""
    if not points:
        return ""
    xs, ys = [x for x, _, _ in points.values()], [y for _, y, _ in points.values()]
    # A margin, so that no point lies on the frame.
    x_axis = Axis(min(xs) / 1.3 if log_x else 0.0, max(xs) * 1.3, log_x)
    y_axis = Axis(0.0, max(ys) * 1.15)
    parts = [
        _text(LEFT + x_axis.at(tick) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM + 16, number(tick), "middle")
        for tick in x_axis.ticks()
    ]
    taken: list[tuple[float, float]] = []
    for at, (_, (x, y, words)) in enumerate(points.items()):
        left, top = LEFT + x_axis.at(x) * (WIDTH - LEFT - RIGHT), _y(y_axis.at(y))
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5" fill="{COLOURS[at % len(COLOURS)]}"/>')
        right = left < WIDTH / 2
        line = top + 4
        # Words of points that are close together go below each other.
        while any(abs(line - y_) < 13 and abs(left - x_) < 120 for x_, y_ in taken):
            line += 13
        taken.append((left, line))
        parts.append(_text(left + (9 if right else -9), line, words, "start" if right else "end"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - BOTTOM + 30, across, "end"))
    said = "; ".join(
        f"{name}: {number(x)} {across}, {number(y)} {unit}, {words}" for name, (x, y, words) in points.items()
    )
    return _frame(title, unit, said, y_axis, list(points), parts)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _frame(title: str, unit: str, said: str, axis: Axis, names: Sequence[str], parts: Sequence[str]) -> str:
    grid = []
    for tick in axis.ticks():
        y = _y(axis.at(tick))
        grid.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" '
            'stroke="currentColor" stroke-opacity="0.15"/>'
        )
        grid.append(_text(LEFT - 6, y + 4, number(tick), "end"))
    legend = []
    x = float(LEFT)
    for at, name in enumerate(names):
        y = HEIGHT - 12
        legend.append(
            f'<rect x="{x:.0f}" y="{y - 9}" width="10" height="10" fill="{COLOURS[at % len(COLOURS)]}"/>'
        )
        legend.append(_text(x + 14, y, name))
        x += 26 + 7.0 * len(name)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12" fill="currentColor" color="#777">'
        f"<title>{escape(title)}</title><desc>{escape(said)}</desc>"
        f'<text x="{LEFT}" y="18" font-size="14" font-weight="600">{escape(title)} ({escape(unit)})</text>'
        f"{''.join(grid)}{''.join(parts)}{''.join(legend)}</svg>\n"
    )
