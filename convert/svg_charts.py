"""Charts as SVG text, without a plotting library: grouped bars, lines, and labelled points.

A chart is one self-contained element: a file of its own or a part of a page. Its text takes the colour of the
page around it and the fonts of whoever looks at it, so that Chinese labels need no font on this machine. The
values also stand in `<desc>`, for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from unicodedata import east_asian_width

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 34, 58
# Distinguishable without red-green vision (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
LINE_HEIGHT = 13


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`. log: logarithmic, where both ends are positive."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Position of `value` on the axis, 0 to 1."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Round numbers: powers of ten (with 2 and 5 where there are few of them), or about five steps."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            return [value for value in values if self.low <= value * 1.0001 and value <= self.high * 1.0001]
        size = self.high - self.low
        if size <= 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(size / 4))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= size / 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True)
class Point:
    """A point of `scatter`. area: of its circle, relative to the largest; colour: an index of COLOURS."""

    x: float
    y: float
    label: str
    area: float = 0.2
    colour: int = 0


def number(value: float) -> str:
    """Three significant digits, without an exponent for everyday sizes."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def bars(title: str, unit: str, groups: Mapping[str, Mapping[str, float]], series: Sequence[str] = ()) -> str:
    """Grouped bars from zero. groups: group -> series -> value; a series may lack a group.

    series: all names in the order of their colours, also those that are not drawn here.
    """
    names = list(series or dict.fromkeys(name for group in groups.values() for name in group))
    high = max((value for group in groups.values() for value in group.values()), default=0.0) or 1.0
    axis = Axis(0.0, high * 1.12)
    group_width = (WIDTH - LEFT - RIGHT) / max(len(groups), 1)
    bar_width = min(group_width * 0.8 / max(len(names), 1), 64.0)
    parts = []
    for index, (label, group) in enumerate(groups.items()):
        middle = LEFT + group_width * (index + 0.5)
        for place, name in enumerate(names):
            if name in group:
                top = _y(axis, group[name])
                x = middle + bar_width * (place - len(names) / 2)
                parts.append(
                    f'<rect x="{x + 1:.1f}" y="{top:.1f}" width="{bar_width - 2:.1f}" '
                    f'height="{HEIGHT - BOTTOM - top:.1f}" fill="{_colour(place)}"/>'
                )
                parts.append(_text(x + bar_width / 2, top - 4, number(group[name]), "middle"))
        parts.append(_text(middle, HEIGHT - BOTTOM + 16, label, "middle"))
    values = "; ".join(
        f"{label}: " + ", ".join(f"{name} {number(value)}" for name, value in group.items())
        for label, group in groups.items()
    )
    return _frame(f"{title} ({unit})", values, axis, [*parts, *_legend(names)])


def lines(
    title: str,
    unit: str,
    x_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    log_x: bool = False,
    log_y: bool = False,
    dots: bool = True,
    faint: Sequence[str] = (),
) -> str:
    """Lines through points (x, y), in order of x; "" where there is no point. faint: names drawn lightly."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    x_axis = Axis(min(xs), max(xs), log_x and min(xs) > 0)
    y_axis = Axis(min(ys) if log_y else 0.0, max(ys) * (1.0 if log_y else 1.08), log_y and min(ys) > 0)
    parts = _x_axis(x_axis, x_label)
    for index, (name, line) in enumerate(series.items()):
        colour, opacity = _colour(index), 0.4 if name in faint else 1
        places = [(_x(x_axis, x), _y(y_axis, y)) for x, y in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" '
            f'stroke-opacity="{opacity}"/>'
        )
        if dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
    values = "; ".join(
        f"{name}: from {number(min(y for _, y in line))} to {number(max(y for _, y in line))}"
        for name, line in series.items()
        if line
    )
    return _frame(f"{title} ({unit})", values, y_axis, [*parts, *_legend(list(series))])


def scatter(
    title: str,
    unit: str,
    x_label: str,
    points: Sequence[Point],
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Labelled circles; "" where there are none. A linear axis begins at zero."""
    if not points:
        return ""
    xs, ys = [point.x for point in points], [point.y for point in points]
    # A margin, so that no circle lies on the frame.
    x_axis = Axis(min(xs) / 1.3 if log_x else 0.0, max(xs) * 1.5, log_x)
    y_axis = Axis(min(ys) / 1.5 if log_y else 0.0, max(ys) * (1.5 if log_y else 1.15), log_y)
    circles, labels = [], []
    boxes = [(_x(x_axis, p.x) - 9, _x(x_axis, p.x) + 9, _y(y_axis, p.y)) for p in points]
    for point in points:
        x, y = _x(x_axis, point.x), _y(y_axis, point.y)
        circles.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{9 * math.sqrt(point.area):.1f}" '
            f'fill="{_colour(point.colour)}" fill-opacity="0.8"/>'
        )
        width = _text_width(point.label)
        left, top = _free_place(x, y, width, boxes)
        boxes.append((left, left + width, top))
        near, anchor = (left - 3, "start") if left > x else (left + width + 3, "end")
        labels.append(_text(left if left > x else left + width, top + 4, point.label, anchor))
        labels.append(
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{top:.1f}" stroke="currentColor" '
            'stroke-opacity="0.5"/>'
        )
    parts = [*_x_axis(x_axis, x_label), *labels, *circles]
    values = "; ".join(f"{p.label}: {number(p.x)} {x_label}, {number(p.y)} {unit}" for p in points)
    return _frame(f"{title} ({unit})", values, y_axis, parts)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _text_width(text: str) -> float:
    """About as wide as `text` is drawn: letters of Chinese, Japanese and Korean are twice as wide."""
    return sum(12 if east_asian_width(letter) in "WF" else 6.5 for letter in text)


def _free_place(
    x: float, y: float, width: float, boxes: Sequence[tuple[float, float, float]]
) -> tuple[float, float]:
    """(left, middle) of a label beside the point (x, y): the nearest place that no box has."""
    gap = 14.0
    shifts = sorted(range(-8, 9), key=abs)
    sides = (x + gap, x - gap - width)
    places = [(left, y + shift * LINE_HEIGHT) for shift in shifts for left in sides]
    fits = [
        (left, middle)
        for left, middle in places
        if left > LEFT and left + width < WIDTH and TOP < middle < HEIGHT - BOTTOM
    ]
    for left, middle in fits:
        if not any(
            left < right and begin < left + width and abs(middle - other) < LINE_HEIGHT
            for begin, right, other in boxes
        ):
            return left, middle
    return fits[0] if fits else places[0]


def _x_axis(axis: Axis, label: str) -> list[str]:
    below = HEIGHT - BOTTOM + 16
    ticks = [_text(_x(axis, tick), below, number(tick), "middle") for tick in axis.ticks()]
    return [*ticks, _text(WIDTH - RIGHT, below + 14, label, "end")]


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    x, y = float(LEFT), HEIGHT - 12
    for index, name in enumerate(names):
        parts.append(f'<rect x="{x:g}" y="{y - 9}" width="10" height="10" fill="{_colour(index)}"/>')
        parts.append(_text(x + 14, y, name))
        x += 26 + _text_width(name)
    return parts


def _frame(title: str, values: str, y_axis: Axis, parts: Sequence[str]) -> str:
    """The whole element: title, description, a line across for each tick of `y_axis`, and `parts`."""
    grid = []
    for tick in y_axis.ticks():
        y = _y(y_axis, tick)
        grid.append(
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" '
            'stroke="currentColor" stroke-opacity="0.15"/>'
        )
        grid.append(_text(LEFT - 6, y + 4, number(tick), "end"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12" fill="currentColor" color="#777">'
        f"<title>{escape(title)}</title><desc>{escape(values)}</desc>"
        f'<text x="{LEFT}" y="18" font-size="14" font-weight="600">{escape(title)}</text>'
        f"{''.join(grid)}{''.join(parts)}</svg>\n"
    )
