"""A table in Markdown and in HTML."""

from __future__ import annotations

from bench.report import grid

HEADINGS = ["", "a & b"]
ROWS = [["1 client"], ["`x` [bold]", "<2>"], ["y", ""]]


def test_markdown_has_a_title_for_each_section() -> None:
    assert grid.markdown(HEADINGS, ROWS).splitlines() == [
        "| | a & b |",
        "| --- | ---: |",
        "| **1 client** | |",
        "| `x` [bold] | <2> |",
        "| y | |",
    ]


def test_html_is_escaped() -> None:
    text = grid.html(HEADINGS, ROWS)
    assert '<tr class="section"><td colspan="2">1 client</td></tr>' in text
    assert "<th>a &amp; b</th>" in text and "<td>x [bold]</td><td>&lt;2&gt;</td>" in text
