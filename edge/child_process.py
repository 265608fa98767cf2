"""Processes that this one starts, and that end with it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

# The engine's process, named here so that it can be started before anything of it is imported.
ENGINE = "edge.engine.worker"
# Keywords of Popen for a group of its own: a terminal's Ctrl-C never reaches it.
APART: dict[str, Any] = {
    "start_new_session": True,
    "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
}


def start(module: str, **options: Any) -> subprocess.Popen[bytes]:
    """`python -m module`, in a group of its own. Its standard input is held open: it ends when this one does.

    options: keywords of Popen.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        **APART,
        **options,
    )
