"""Rules of Windows on Linux, for code that runs in this process.

A file that is open or mapped here cannot be replaced, renamed or removed, nor can a folder that holds one, or
the current one; there are no symbolic links; text is written with CRLF.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def in_use() -> Iterator[str]:
    """The regular files that this process holds open or mapped, and its folder."""
    yield os.getcwd()  # noqa: PTH109
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            name = os.readlink(f"/proc/self/fd/{entry}")  # noqa: PTH115
        except OSError:
            continue  # it was the listing's own
        if os.path.isfile(name):  # noqa: PTH113
            yield name
    with io.FileIO("/proc/self/maps") as maps:
        for line in maps.readall().decode("utf-8", "surrogateescape").splitlines():
            name = line.partition("/")[2]
            if name:
                yield "/" + name


def refuse(path: Any) -> None:
    """Raise PermissionError where Windows would."""
    if not isinstance(path, str | bytes | os.PathLike):
        return
    name = os.path.realpath(os.fsdecode(path))
    for held in in_use():
        if held == name or held.startswith(name + "/"):
            raise PermissionError(errno.EACCES, f"it is open in this process: {held}", os.fsdecode(path))


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the rules in force until `patch` is undone."""

    def checked(function: Callable[..., Any], places: int) -> Callable[..., Any]:
        def call(*paths: Any, **options: Any) -> Any:
            for path in paths[:places]:
                refuse(path)
            return function(*paths, **options)

        return call

    for name, places in (("replace", 2), ("rename", 2), ("unlink", 1), ("remove", 1), ("rmdir", 1)):
        patch.setattr(os, name, checked(getattr(os, name), places))
    # As there: names, where Linux goes by handles of folders.
    patch.setattr(shutil, "_use_fd_functions", False)

    def no_links(source: Any, target: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "A required privilege is not held by the client", os.fsdecode(target))

    patch.setattr(os, "symlink", no_links)
    real = io.open

    def with_crlf(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, *rest: Any, **options: Any,
    ) -> Any:  # fmt: skip
        if newline is None and "b" not in mode and set(mode) & set("wax+"):
            newline = "\r\n" if "+" not in mode else None
        return real(file, mode, buffering, encoding, errors, newline, *rest, **options)

    patch.setattr(io, "open", with_crlf)
    patch.setattr(builtins, "open", with_crlf)


def held(path: Path) -> Callable[[], None]:
    """Hold the file open; the result lets it go."""
    return path.open("rb").close
