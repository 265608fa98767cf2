"""A table in its three forms."""

from __future__ import annotations

from rich.console import Console

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


def test_the_terminal_shows_cells_as_they_are() -> None:
    console = Console(width=60)
    with console.capture() as shown:
        console.print(grid.terminal(HEADINGS, ROWS, title="贝壳 [1]"))
    text = shown.get()
    assert "贝壳 [1]" in text and "x [bold]" in text and "<2>" in text and "1 client" in text
