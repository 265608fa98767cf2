"""Progress of commands: bars on a terminal, and JSON lines for programs.

With `--progress json` a verb's stdout holds JSON lines alone, and its words go to stderr:

    {"stage": "training", "done": 3, "total": 40, "unit": "steps", "seconds_left": 12.5, "loss": 1.9, ...}
    {"result": {"path": "runs/conch/adapter"}, "exit_code": 0}
    {"error": "the disk is full: ...", "hint": "free some space and run it again", "exit_code": 1}

The last line is a result or an error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

T = TypeVar("T")
# Seconds between two lines of one stage, but for those of training steps.
_EVERY_S = 0.2


class Lines:
    """The JSON lines of one command."""

    def __init__(self, out: TextIO) -> None:
        self.result: dict[str, Any] = {}
        self.handed_over = False
        self._out, self._stage = out, ""
        self._began = self._last = 0.0
        self._first = 0

    def progress(self, stage: str, done: int | None, total: int | None, facts: dict[str, Any]) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, done or 0
        elif now - self._last < _EVERY_S and done != total and "step" not in facts:
            return
        self._last = now
        left = None
        if done is not None and total is not None and done > self._first:
            left = round((now - self._began) / (done - self._first) * (total - done), 1)
        self.write({"stage": stage, "done": done, "total": total, "seconds_left": left, **facts})

    def hand_over(self) -> int:
        """The file descriptor of the lines, for a process that writes all of them in this one's place."""
        self.handed_over = True
        return self._out.fileno()

    def write(self, line: dict[str, Any]) -> None:
        import msgspec

        # NaN and infinity, which JSON lacks, become null.
        self._out.write(msgspec.json.encode(line).decode("utf-8") + "\n")
        self._out.flush()


_lines: Lines | None = None
_phases: list[tuple[str, Status | None]] = []


def add_progress_option(parser: argparse.ArgumentParser) -> None:
    """Add --progress, which `edge.console.guarded` acts upon."""
    parser.add_argument("--progress", choices=("json",), help="JSON lines on stdout, the words on stderr")


def report(stage: str, done: int | None = None, total: int | None = None, **facts: Any) -> None:
    """Write a line of progress where `--progress json` was given.

    facts: `unit` of done and total, `seconds_left` where that is known better than from the pace, figures.
    """
    if _lines is not None:
        _lines.progress(stage, done, total, facts)


def result(**facts: Any) -> None:
    """Put what a command made into its last line."""
    if _lines is not None:
        _lines.result |= facts


def stdout_of_child() -> int | None:
    """The stdout of a child that gets this command's arguments, and so writes its progress and result."""
    return None if _lines is None else _lines.hand_over()


@contextlib.contextmanager
def phase(console: Console | None, text: str) -> Iterator[None]:
    """Say what takes long while the block runs: a spinner on a terminal, a line of progress."""
    report(text)
    with console.status(text) if console else contextlib.nullcontext() as spinner:
        _phases.append((text, spinner))
        try:
            yield
        finally:
            _phases.pop()


def counted(items: Collection[T], unit: str) -> Iterator[T]:
    """The items; the innermost phase says how many of them are done."""
    for done, item in enumerate(items):
        if _phases:
            text, spinner = _phases[-1]
            report(text, done, len(items), unit=unit)
            if spinner is not None:
                spinner.update(f"{text}: {done} of {len(items)} {unit}")
        yield item


def failure(message: str, hint: str, code: int) -> None:
    """Write the last line of a command that failed."""
    if _lines is not None:
        _lines.write({"error": message, "hint": hint, "exit_code": code})


@contextlib.contextmanager
def json_lines() -> Iterator[Lines]:
    """Within the block stdout is stderr, for child processes and native code too; the lines keep stdout."""
    global _lines
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out, contextlib.redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        try:
            _lines = Lines(out)
            yield _lines
        finally:
            _lines = None
            os.dup2(out.fileno(), 1)
