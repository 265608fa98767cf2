"""One training at a time in a run folder: a lock file that names the process that trains there.

RUN/train.lock   {"pid": 1234, "host": "name", "started": seconds since 1970}
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from edge.artefact import manifest, windows_names
from edge.errors import ExistsError

FILE = "train.lock"
# Between the file's creation and its text a starter needs far less.
_WRITTEN_WITHIN_S = 30


@contextlib.contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keep other trainings out of `run` while the block runs, and sweep what killed ones left there.

    A lock whose process is gone from this host is taken over. Raises ExistsError, which names process and
    host, where another training holds it. Of several processes that train together the first one holds it.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    windows_names.check(run)
    absent = not run.exists()
    if not absent and not run.is_dir():
        raise ExistsError(f"output_dir: {run} is a file", "choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    path = run / FILE
    _take(path)
    try:
        manifest.sweep(run)
        yield
    finally:
        path.unlink(missing_ok=True)
        if absent:
            # Only where nothing came of it.
            with contextlib.suppress(OSError):
                run.rmdir()


def _take(path: Path) -> None:
    started = psutil.Process().create_time()
    text = json.dumps({"pid": os.getpid(), "host": platform.node(), "started": started})
    while True:
        try:
            # "x" is O_CREAT | O_EXCL: of two starters one creates it.
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return
        except FileExistsError:
            _remove_stale(path)


def _remove_stale(path: Path) -> None:
    """Remove the lock where its process is gone. Raises ExistsError where it is not."""
    try:
        text, age = path.read_text(encoding="utf-8"), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return
    owner = _owner(text)
    if owner is None and age < _WRITTEN_WITHIN_S:
        raise ExistsError(f"another training begins in {path.parent}", "choose another output_dir, or wait")
    here = owner is not None and owner["host"] == platform.node()
    if owner is not None and (not here or manifest.alive(owner["pid"], owner["started"])):
        raise ExistsError(
            f"process {owner['pid']} on {owner['host']} trains in {path.parent}",
            "choose another output_dir, or wait for its end"
            + ("" if here else f"; if it is gone, delete {path}"),
        )
    aside = path.with_name(f"{FILE}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        path.replace(aside)
        if aside.read_text(encoding="utf-8") == text:
            aside.unlink()
        else:
            # Another starter took it over between the two lines above.
            aside.replace(path)


def _owner(text: str) -> dict[str, Any] | None:
    """What the lock says; None for one that was not written to its end."""
    try:
        owner = json.loads(text)
        return {"pid": int(owner["pid"]), "host": str(owner["host"]), "started": float(owner["started"])}
    except (ValueError, KeyError, TypeError):
        return None
