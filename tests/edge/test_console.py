"""What every command prints by."""

from __future__ import annotations

from rich.console import Console

from edge import console


def test_a_table_shows_cells_as_they_are() -> None:
    rows = [["1 client"], ["`x` [bold]", "<2>"], ["y", ""]]
    screen = Console(width=60)
    with screen.capture() as shown:
        screen.print(console.plain_table(["", "a & b"], rows, title="贝壳 [1]"))
    text = shown.get()
    assert "贝壳 [1]" in text and "x [bold]" in text and "<2>" in text and "1 client" in text
