"""Charts: scales, well-formed SVG, what is drawn where, and the values in words."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from convert import svg_charts
from convert.svg_charts import Axis, Point


def test_axes() -> None:
    assert Axis(10, 30).share(15) == 0.25
    assert Axis(0, 100).ticks() == [0, 20, 40, 60, 80, 100]
    assert Axis(0.1, 10, log=True).ticks() == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert Axis(1, 100, log=True).share(10) == pytest.approx(0.5)
    assert Axis(3, 3).share(3) == 0.5 and Axis(3, 3).ticks() == [3]


def test_charts_are_well_formed_and_say_their_values() -> None:
    svg = svg_charts.bars("标题 <1>", "tokens/s", {"1 client": {"a & b": 10.0, "c": 95.0}, "8": {"c": 160.0}})
    root = ET.fromstring(svg)
    heights = [float(r.get("height", 0)) for r in root.iter("{http://www.w3.org/2000/svg}rect")][:3]
    assert heights[1] / heights[0] == pytest.approx(9.5, rel=0.01)
    assert heights[2] / heights[1] == pytest.approx(160 / 95, rel=0.01)
    assert "a &amp; b 10, c 95; 8: c 160" in svg and "标题 &lt;1&gt;" in svg
    ET.fromstring(svg_charts.lines("t", "s", "x", {"a": [(1, 0.1), (8, 2.0)]}, log_x=True, log_y=True))
    assert svg_charts.lines("t", "s", "x", {"a": []}) == ""
    assert svg_charts.number(1234.5) == "1,234" and svg_charts.number(0.01234) == "0.0123"


def test_labels_of_points_do_not_lie_on_each_other() -> None:
    points = [Point(10 + n / 100, 1e-3, f"type {n} 贝壳") for n in range(6)]
    points.append(Point(90, 1.0, "far", area=0.8, colour=1))
    svg = svg_charts.scatter("t", "nats", "tokens/s", points, log_x=True, log_y=True)
    root = ET.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    texts = {e.text: (float(e.get("x", 0)), float(e.get("y", 0))) for e in root.iter(f"{space}text")}
    places = [texts[point.label] for point in points[:6]]
    for index, (x, y) in enumerate(places):
        for other_x, other_y in places[:index]:
            assert abs(y - other_y) >= svg_charts.LINE_HEIGHT or abs(x - other_x) > 10, places
    circles = list(root.iter(f"{space}circle"))
    assert float(circles[-1].get("r", 0)) / float(circles[0].get("r", 0)) == pytest.approx(2.0, rel=0.02)
    assert float(circles[-1].get("cx", 0)) > float(circles[0].get("cx", 0))
    assert svg_charts.scatter("t", "s", "x", []) == ""


def test_the_names_of_a_legend_take_their_width() -> None:
    def second(first: str) -> float:
        root = ET.fromstring(svg_charts.bars("t", "s", {"g": {first: 1.0, "b": 2.0}}))
        return float(list(root.iter("{http://www.w3.org/2000/svg}rect"))[-1].get("x", 0))

    assert second("损失损失") - second("loss") == 4 * (12 - 6.5)
