"""What every command does around its `main`: UTF-8 output, progress, errors as messages with an exit code.

With `--progress json` a verb's stdout holds JSON lines alone, and its words go to stderr:

    {"stage": "training", "done": 3, "total": 40, "unit": "steps", "seconds_left": 12.5, "loss": 1.9, ...}
    {"result": {"path": "runs/conch/adapter"}, "exit_code": 0}
    {"error": "the disk is full: ...", "hint": "free some space and run it again", "exit_code": 1}

The last line is a result or an error.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from edge.errors import EdgeError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table

T = TypeVar("T")
# Ctrl-C, the end of a session, and what stands for Ctrl-C between processes on Windows.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)
# Seconds between two lines of one stage, but for those of training steps.
_EVERY_S = 0.2


def utf8_console() -> None:
    """Make printing safe under any locale: a character that the console cannot show is escaped."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="backslashreplace")


def plain_console(*, quiet: bool = False) -> Console:
    """A console for lines with paths and names: nothing in them is markup, and none is wrapped."""
    from rich.console import Console

    return Console(markup=False, highlight=False, soft_wrap=True, quiet=quiet)


def plain_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", left: int = 1
) -> Table:
    """A table of plain text. The first `left` columns are text, the others numbers.

    A row of one cell is the title of a section.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) or None, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(escape(heading), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        cells = [escape(cell.replace("`", "")) for cell in row]
        if len(cells) == 1:
            table.add_section()
            cells = [f"[bold]{cells[0]}[/bold]"]
        table.add_row(*cells)
    return table


@contextlib.contextmanager
def handling(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """These signals go to `handler` for the time of the block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


# Progress


class _Lines:
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


_lines: _Lines | None = None
_phases: list[tuple[str, Status | None]] = []


def add_progress_option(parser: argparse.ArgumentParser) -> None:
    """Add --progress, which `guarded` acts upon."""
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


@contextlib.contextmanager
def _json_lines() -> Iterator[_Lines]:
    """Within the block stdout is stderr, for child processes and native code too; the lines keep stdout."""
    global _lines
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out, contextlib.redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        try:
            _lines = _Lines(out)
            yield _lines
        finally:
            _lines = None
            os.dup2(out.fileno(), 1)


# Errors


def guarded(run: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a command; every error that a user can meet becomes a message and an exit code."""
    utf8_console()
    asked = "--progress=json" in argv or ("--progress", "json") in itertools.pairwise(argv)
    # Of processes that train together the first one speaks.
    if not asked or int(os.environ.get("RANK", "0")):
        return _guarded(run, argv)
    with _json_lines() as lines:
        try:
            code = _guarded(run, argv)
        except SystemExit as stop:
            if stop.code:
                lines.write({"error": "a wrong argument, as stderr says", "hint": "", "exit_code": stop.code})
            raise
        except Exception as error:
            lines.write({"error": f"{type(error).__name__}: {error}", "hint": "", "exit_code": 1})
            raise
        if code == 0 and not lines.handed_over:
            lines.write({"result": lines.result, "exit_code": code})
        return code


def _guarded(run: Callable[[list[str]], int], argv: list[str]) -> int:
    if sys.platform == "win32":
        signal.signal(signal.SIGBREAK, signal.default_int_handler)
    try:
        try:
            return run(argv)
        except RuntimeError as error:
            # Python 3.11 wraps what is raised while a class of an imported module is made.
            if not isinstance(error.__cause__, KeyboardInterrupt):
                raise
            raise error.__cause__ from None
        except KeyboardInterrupt:
            # A second one ends the process at once, and without a traceback.
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise
    except EdgeError as error:
        return _fail(error.message, error.exit_code, error.hint)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C; nothing was left half-written under a final name", 130)
    except BrokenPipeError:
        # The reader has gone (`edge ... | head`); the interpreter must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno == errno.ENOSPC:
            place = error.filename or "while writing"
            return _fail(f"the disk is full: {place}", 1, "free some space and run it again")
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}", 1)
        raise


def _fail(message: str, code: int, hint: str = "") -> int:
    sys.stderr.write(f"error: {EdgeError(message, hint)}\n")
    if _lines is not None:
        _lines.write({"error": message, "hint": hint, "exit_code": code})
    return code
