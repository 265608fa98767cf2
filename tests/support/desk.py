"""An engine driven by hand, turn by turn, on the test's own thread."""

from __future__ import annotations

from edge.backends.base import Backend
from edge.engine import protocol as msg
from edge.engine.core import Engine
from edge.engine.sampling import Params

# Fields of a request that are not parameters of sampling.
_FIELDS = ("reuse", "timeout_s", "constraint", "speculate", "reasoning")


class Desk:
    """An engine driven by hand, and what came out of it. Its slots are all free when it has run."""

    def __init__(self, backend: Backend, **options: object) -> None:
        self.events: list[msg.Event] = []
        self.backend = backend
        self.engine = Engine(backend, self.events.extend, **options)  # type: ignore[arg-type]

    def submit(self, key: int, prompt: str | list[int], **given: object) -> None:
        extra = {name: given.pop(name) for name in _FIELDS if name in given}
        self.engine.submit(msg.Submit(key, prompt, Params(**given), **extra))  # type: ignore[arg-type]

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.engine.turn()

    def idle(self) -> None:
        """Until nothing is left to do; more may be submitted then."""
        self.engine.turn()
        for _ in range(10_000):
            if not self.engine.busy:
                return
            self.engine.turn()
        raise AssertionError("the engine did not come to an end")

    def run(self, turns: int = 10_000) -> None:
        self.engine.drain(1e9)
        for _ in range(turns):
            if not self.engine.turn():
                assert self.engine.cache.busy == 0
                return
        raise AssertionError("the engine did not come to an end")

    def text(self, key: int) -> str:
        return "".join(e.text for e in self.events if isinstance(e, (msg.Delta, msg.Done)) and e.key == key)

    def made(self, key: int) -> list[bytes]:
        """The bytes of each token, of a request that asked for logprobs."""
        return [entry.token for entry in self.logprobs(key)]

    def logprobs(self, key: int) -> list[msg.Logprob]:
        rows = [e for e in self.events if isinstance(e, (msg.Delta, msg.Done)) and e.key == key]
        return [entry for row in rows for entry in row.logprobs or []]

    def tokens(self, key: int) -> int:
        """How many have been told so far."""
        return sum(e.tokens for e in self.events if isinstance(e, msg.Delta) and e.key == key)

    def done(self, key: int) -> msg.Done:
        [found] = [e for e in self.events if isinstance(e, msg.Done) and e.key == key]
        return found

    def refused(self, key: int) -> msg.Refused:
        [found] = [e for e in self.events if isinstance(e, msg.Refused) and e.key == key]
        return found
