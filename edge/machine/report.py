"""`edge doctor --report`: one text file on this machine for whoever helps, with nothing personal in it."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edge import __version__
from edge.setup import source_tree

FILE = "edge-report.txt"
# A module of its own process: it needs what this package may not import.
SELF_TEST = "bench.self_test"
_LIMIT_S = 1800


def personal() -> list[str]:
    """Folders and names of this user and machine, longest first."""
    folders = [Path.cwd(), Path(sys.prefix), Path(sys.executable).parent, Path(tempfile.gettempdir())]
    names = [
        platform.node(),
        platform.node().split(".")[0],
        os.environ.get("USERNAME", ""),
        os.environ.get("USER", ""),
    ]
    try:
        folders.append(Path.home())
        names += [Path.home().name, getpass.getuser()]
    except (RuntimeError, OSError, KeyError, ImportError):
        pass  # a user without a name or a home folder
    if tree := source_tree():
        folders.append(tree)
    texts = [str(folder) for folder in folders if len(folder.parts) > 1]
    return sorted({*texts, *filter(None, names)}, key=len, reverse=True)


def impersonal(text: str, words: Iterable[str]) -> str:
    """`text` without `words`, other absolute paths, addresses and e-mail addresses."""
    for word in words:
        mark = "<path>" if re.search(r"[/\\]", word) else "<name>"
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", mark, text, flags=re.IGNORECASE)
    text = re.sub(r"\b\w+://[^\s'\"]+", "<address>", text)
    text = re.sub(r"\b[\w.+-]+@[\w-]+\.[\w.-]+", "<address>", text)
    text = re.sub(r"\b\d{1,3}(?:\.\d{1,3}){3}\b(?!\.)", "<address>", text)
    text = re.sub(r"(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){3,7}[0-9A-Fa-f:]*", "<address>", text)
    text = re.sub(r"(?<![\w:])[0-9A-Fa-f]{0,4}::[0-9A-Fa-f][0-9A-Fa-f:]*", "<address>", text)
    text = re.sub(r"(?<![\w.])(?:[A-Za-z]:[\\/]|\\{2,4}\w)[^\s'\";,)|]*", "<path>", text)
    # A POSIX path has two parts: "and/or" and "ms/step" stay.
    text = re.sub(r"(?<![\w.<>])/[\w.~+@-]+(?:/[^\s'\";,)|]*)+", "<path>", text)
    return re.sub(r"<path>[/\\][^\s'\";,)|]+", "<path>", text)


def self_test() -> list[dict[str, Any]]:
    """The outcomes of the verbs on a toy, as bench.self_test has them; one that failed where it gave none."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", SELF_TEST], stdout=subprocess.PIPE, timeout=_LIMIT_S, check=False
        )
        outcomes: list[dict[str, Any]] = json.loads(done.stdout.decode("utf-8").strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return [{"stage": "all", "seconds": 0.0, "digest": "", "problem": f"no outcome: {error!r}"}]
    return outcomes


def text(rows: Iterable[tuple[str, str, str, str]], outcomes: Iterable[dict[str, Any]]) -> str:
    """The report. rows: group, name, what is there and what to do, of each line of the doctor."""
    lines = [f"edge {__version__}, a report without paths, names and addresses: read it, then send it", ""]
    for group, name, there, todo in rows:
        lines.append(f"{group:<10} {name}: {there}{f'  -> {todo}' if todo else ''}")
    lines += ["", "self-test: the verbs on a toy"]
    for row in outcomes:
        ending = "FAILED: " + " ".join(row["problem"].split()) if row["problem"] else row["digest"]
        lines.append(f"{row['stage']:<18} {row['seconds']:7.1f} s  {ending}")
    return impersonal("\n".join(lines) + "\n", personal())
