"""A table in Markdown and in HTML; `edge.console.plain_table` is its form for the terminal.

Rows are lists of cells; a row of one cell is the title of a section.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

Row = Sequence[str]


def markdown(headings: Sequence[str], rows: Iterable[Row], *, left: int = 1) -> str:
    """The table's lines, each with its end."""
    count = len(headings)
    lines = [headings, ["---"] * left + ["---:"] * (count - left)]
    lines += [row if len(row) > 1 else [f"**{row[0]}**", *[""] * (count - 1)] for row in rows]
    return "".join(f"|{''.join(f' {cell} |' if cell else ' |' for cell in line)}\n" for line in lines)


def html(headings: Sequence[str], rows: Iterable[Row]) -> str:
    """A <table>; sections have the class "section"."""
    lines = [f"<tr>{''.join(f'<th>{escape(heading)}</th>' for heading in headings)}</tr>"]
    for row in rows:
        cells = [escape(cell.replace("`", "")) for cell in row]
        section = f'<tr class="section"><td colspan="{len(headings)}">{cells[0]}</td></tr>'
        lines.append(
            section if len(cells) == 1 else f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    return f"<table>{''.join(lines)}</table>"
