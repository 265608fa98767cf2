"""An engine driven by hand, turn by turn, on the test's own thread."""

from __future__ import annotations

from edge import messages as msg
from edge.backends.base import Backend
from edge.engine import Engine
from edge.sampling import Params


class Desk:
    """An engine driven by hand, and what came out of it."""

    def __init__(self, backend: Backend, **options: object) -> None:
        self.events: list[msg.Event] = []
        self.backend = backend
        self.engine = Engine(backend, self.events.extend, **options)  # type: ignore[arg-type]

    def submit(self, key: int, prompt: str | list[int], **given: object) -> None:
        extra = {name: given.pop(name) for name in ("reuse", "timeout_s") if name in given}
        self.engine.submit(msg.Submit(key, prompt, Params(**given), **extra))  # type: ignore[arg-type]

    def run(self, turns: int = 10_000) -> None:
        self.engine.drain(1e9)
        for _ in range(turns):
            if not self.engine.turn():
                return
        raise AssertionError("the engine did not come to an end")

    def text(self, key: int) -> str:
        return "".join(e.text for e in self.events if isinstance(e, (msg.Delta, msg.Done)) and e.key == key)

    def made(self, key: int) -> list[bytes]:
        rows = [e for e in self.events if isinstance(e, (msg.Delta, msg.Done)) and e.key == key]
        return [entry.token for row in rows for entry in row.logprobs or []]

    def done(self, key: int) -> msg.Done:
        [found] = [e for e in self.events if isinstance(e, msg.Done) and e.key == key]
        return found

    def refused(self, key: int) -> msg.Refused:
        [found] = [e for e in self.events if isinstance(e, msg.Refused) and e.key == key]
        return found
