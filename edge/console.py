"""What every command does around its `main`: UTF-8 output, and errors as messages with an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge.errors import EdgeError

if TYPE_CHECKING:
    from rich.console import Console


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


def guarded(run: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a command; every error that a user can meet becomes a message and an exit code."""
    utf8_console()
    try:
        try:
            return run(argv)
        except KeyboardInterrupt:
            # A second one ends the process at once, and without a traceback.
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise
    except EdgeError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C; nothing was left half-written under a final name", 130)
    except BrokenPipeError:
        # The reader has gone (`edge ... | head`); the interpreter must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno == errno.ENOSPC:
            place = error.filename or "while writing"
            return _fail(f"the disk is full: {place}\n  free some space and run it again", 1)
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}", 1)
        raise


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code
