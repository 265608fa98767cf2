"""Processes that this one starts, and that end with it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def start(module: str, **options: Any) -> subprocess.Popen[bytes]:
    """`python -m module` with its standard input held open: it ends when this process does.

    In a group of its own, so that a terminal's Ctrl-C never reaches it. options: keywords of Popen.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        **options,
    )
