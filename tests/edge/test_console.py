"""What every command prints by."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from edge import console


def test_a_table_shows_cells_as_they_are() -> None:
    rows = [["1 client"], ["`x` [bold]", "<2>"], ["y", ""]]
    screen = Console(width=60)
    with screen.capture() as shown:
        screen.print(console.plain_table(["", "a & b"], rows, title="贝壳 [1]"))
    text = shown.get()
    assert "贝壳 [1]" in text and "x [bold]" in text and "<2>" in text and "1 client" in text


class Stream(io.TextIOWrapper):
    """What is written, as a terminal or a pipe of a Chinese Windows takes it."""

    def __init__(self, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="gbk")
        self.isatty = lambda: terminal  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("terminal", "shown"), [(True, "海螺\\U0001f41a".encode("gbk")), (False, "海螺🐚".encode())]
)
def test_t6_a_terminal_is_written_in_its_own_encoding(
    terminal: bool, shown: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    console.utf8_console()
    stream.write("海螺🐚")
    stream.flush()
    assert stream.buffer.getvalue() == shown  # type: ignore[attr-defined]
