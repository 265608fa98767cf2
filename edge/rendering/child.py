"""The process that renders chat templates: `python -m edge.rendering.child`, started by the client beside it.

It reads requests from standard input and writes a reply to each, as JSON behind its length. Its memory is
bounded, and a request that takes longer than RENDER_S ends it. It ends with its standard input, too: when the
process that started it is gone.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import Any

from edge.rendering import sandbox
from edge.rendering.memory_limit import limit_memory
from edge.rendering.protocol import MEMORY, RENDER_S, frame, read_frame

_LONGEST_MESSAGE = 2000


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request, for a template's `source`: its text for a `context`; else what it names.

    {"text"}, {"variables", "literals"}, {"invalid": why}, or {"refused": why, "code"}.
    """
    source = request["source"]
    try:
        try:
            variables, literals = sandbox.variables(source), sandbox.literals(source)
        except Exception as error:  # jinja2 and Python's compiler fail in many ways at an odd source
            return {"invalid": str(error)[:_LONGEST_MESSAGE]}
        if "context" not in request:
            return {"variables": variables, "literals": literals}
        return {"text": sandbox.render(source, request["context"], request.get("cut", ""))}
    except sandbox.Refusal as refusal:
        return {"refused": str(refusal)[:_LONGEST_MESSAGE], "code": refusal.code}
    except MemoryError:
        why = f"needs more than {MEMORY // 2**20} MiB of memory for these messages"
        return {"refused": why, "code": sandbox.TOO_LARGE}


def _write(reply: dict[str, Any]) -> None:
    sys.stdout.buffer.write(frame(reply))
    sys.stdout.buffer.flush()


def main() -> int:
    # A service's stop may reach every process; the one that asks decides how to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    requests = sys.stdin.buffer
    try:
        _write({"limited": limit_memory(MEMORY)})
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            while (request := read_frame(requests)) is not None:
                faulthandler.dump_traceback_later(RENDER_S, exit=True, file=nowhere)
                reply = answer(request)
                faulthandler.cancel_dump_traceback_later()
                _write(reply)
    except OSError:
        # The process that asks has ended; nor could the interpreter write what is left.
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
