"""What every command does around its `main`: UTF-8 output, and errors as messages with an exit code."""

from __future__ import annotations

import _thread
import contextlib
import errno
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edge.errors import EdgeError
from edge.progress import failure, json_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Ctrl-C, the end of a session, and what stands for Ctrl-C between processes on Windows.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)


def utf8_console() -> None:
    """Make printing safe under any locale: UTF-8 into files and pipes, and to a terminal what it can show."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")


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


@contextlib.contextmanager
def _lasting_interrupts() -> Iterator[None]:
    """A Ctrl-C that Python drops, as in a weak reference's callback amid an import, comes once more."""
    before = sys.unraisablehook

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            # No Thread: its start may wait for a lock that this thread holds.
            _thread.start_new_thread(_interrupt, ())
        else:
            before(dropped)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt() -> None:
    """Ctrl-C for the main thread, a moment later."""
    time.sleep(0.01)
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGINT)
    else:
        # To that thread, so that it wakes up.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def guarded(run: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a command; every error that a user can meet becomes a message and an exit code."""
    utf8_console()
    asked = "--progress=json" in argv or ("--progress", "json") in itertools.pairwise(argv)
    # Of processes that train together the first one speaks.
    if not asked or int(os.environ.get("RANK", "0")):
        return _guarded(run, argv)
    with json_lines() as lines:
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
            with _lasting_interrupts():
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
        if known := explained(error):
            return _fail(known.message, 1, known.hint)
        raise


def explained(error: OSError) -> EdgeError | None:
    """What a user can mend: a full disk, or a file that the system refuses."""
    if error.errno == errno.ENOSPC:
        place = error.filename or "while writing"
        return EdgeError(f"the disk is full: {place}", "free some space and run it again")
    return EdgeError(f"{error.filename}: {error.strerror}") if error.filename is not None else None


def _fail(message: str, code: int, hint: str = "") -> int:
    sys.stderr.write(f"error: {EdgeError(message, hint)}\n")
    failure(message, hint, code)
    return code
