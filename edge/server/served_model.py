"""What the routes serve: one artefact, its engine and its chat template."""

from __future__ import annotations

import time

from edge.artefact.find import Artefact
from edge.backends.base import BackendInfo
from edge.chat_template import ChatTemplate
from edge.engine import protocol as msg
from edge.engine.client import EngineProcess
from edge.errors import RequestError


class Serving:
    """An artefact behind HTTP. name: its id in `model` fields. created: when this server took it up."""

    def __init__(self, artefact: Artefact | None, engine: EngineProcess, name: str) -> None:
        self.engine = engine
        self.name = name
        self.digest = artefact.digest if artefact else ""
        self.artefact = artefact
        self.thinking = artefact.thinking if artefact else None
        self.created = int(time.time())
        self._template: tuple[str, ChatTemplate] | None = None

    @property
    def ready(self) -> BackendInfo:
        """The loaded model. Raises RequestError (503) until it is."""
        if self.engine.failure is not None:
            raise RequestError(str(self.engine.failure), status=503, code="model_failed")
        if self.engine.ready is None:
            raise RequestError("the model is being loaded", status=503, code="model_loading", retry_after=1.0)
        return self.engine.ready

    def template(self) -> ChatTemplate:
        """The model's chat template. Raises RequestError (400) where it has none."""
        ready = self.ready
        if ready.chat_template is None:
            raise RequestError(
                f"{self.name} has no chat template",
                code="no_chat_template",
                param="messages",
                hint="ask with raw: true, or serve a model that has one",
            )
        if self._template is None or self._template[0] != ready.chat_template:
            compiled = ChatTemplate(ready.chat_template, bos=ready.bos_text, eos=ready.eos_text)
            self._template = (ready.chat_template, compiled)
        return self._template[1]

    def headers(self) -> dict[str, str]:
        """Which model answered, and on what device."""
        ready = self.ready
        headers = {"x-edge-model": self.name, "x-edge-device": ready.device}
        if self.digest:
            headers["x-edge-digest"] = self.digest
        # Header values are latin-1: a name with other characters is sent escaped.
        return {k: v.encode("ascii", "backslashreplace").decode("ascii") for k, v in headers.items()}


def timings(done: msg.Done) -> dict[str, float]:
    """Seconds in the queue, reading the prompt and decoding, and tokens a second of the latter two."""
    computed = done.prompt_tokens - done.cached_tokens
    return {
        "queue_s": round(done.queue_s, 4),
        "prefill_s": round(done.prefill_s, 4),
        "decode_s": round(done.decode_s, 4),
        "prefill_tokens_per_s": round(computed / done.prefill_s, 1) if done.prefill_s > 0 else 0.0,
        # The first token comes out of the prefill.
        "decode_tokens_per_s": round(max(done.completion_tokens - 1, 0) / done.decode_s, 1)
        if done.decode_s > 0
        else 0.0,
    }


def finish_reason(done: msg.Done) -> str:
    """stop or length. Raises RequestError (408) where the request ran out of the time that it gave itself."""
    if done.reason == "timeout":
        raise RequestError("the request ran out of its time", status=408, code="timeout", param="timeout")
    if done.reason == "cancelled":
        raise RequestError("the server is shutting down", status=503, code="shutting_down")
    return done.reason
