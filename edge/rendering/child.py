"""The process that renders chat templates: `python -m edge.rendering.child`, started by the client beside it.

It reads requests from standard input and writes a reply to each, as JSON behind its length. Its memory is
bounded, and a request that takes longer than RENDER_S ends it. It ends with its standard input, too: when the
process that started it is gone.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import IO, Any

MEMORY = 512 * 2**20
RENDER_S = 1.0
_LONGEST_MESSAGE = 2000


def frame(value: Any) -> bytes:
    """`value` as JSON behind its length.

    Raises TypeError, ValueError or RecursionError for what JSON cannot say.
    """
    body = json.dumps(value).encode("ascii")
    return len(body).to_bytes(4, "big") + body


def read_frame(stream: IO[bytes]) -> Any:
    """The value of the next frame; None where the stream has ended."""
    head = stream.read(4)
    size = int.from_bytes(head, "big") if len(head) == 4 else 0
    body = stream.read(size)
    return json.loads(body) if size and len(body) == size else None


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request, for a template's `source`: its text for a `context`; else its variables.

    {"text"}, {"variables"}, {"invalid": why}, or {"refused": why, "code"}.
    """
    # Imported late: the process must ignore signals first.
    from edge.rendering import sandbox

    source = request["source"]
    try:
        try:
            variables = sandbox.variables(source)
        except Exception as error:  # jinja2 and Python's compiler fail in many ways at an odd source
            return {"invalid": str(error)[:_LONGEST_MESSAGE]}
        if "context" not in request:
            return {"variables": variables}
        return {"text": sandbox.render(source, request["context"])}
    except sandbox.Refusal as refusal:
        return {"refused": str(refusal)[:_LONGEST_MESSAGE], "code": refusal.code}
    except MemoryError:
        why = f"needs more than {MEMORY // 2**20} MiB of memory for these messages"
        return {"refused": why, "code": sandbox.TOO_LARGE}


def _write(reply: dict[str, Any]) -> None:
    sys.stdout.buffer.write(frame(reply))
    sys.stdout.buffer.flush()


def main() -> int:
    # Ctrl-C and a service's stop reach the whole group; the process that asks decides how to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    from edge.rendering.memory_limit import limit_memory

    requests = sys.stdin.buffer
    _write({"limited": limit_memory(MEMORY)})
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        while True:
            # The request itself is on its way; the time runs from its first bytes.
            request = read_frame(requests)
            if request is None:
                return 0
            faulthandler.dump_traceback_later(RENDER_S, exit=True, file=nowhere)
            reply = answer(request)
            faulthandler.cancel_dump_traceback_later()
            _write(reply)


if __name__ == "__main__":
    sys.exit(main())
