"""What the routes serve: one artefact, its engine and its chat template."""

from __future__ import annotations

import asyncio
import functools
import re
import struct
from collections.abc import Iterable

from starlette.requests import Request

from edge.artefact.find import Artefact
from edge.backends.base import BackendInfo
from edge.chat_template import ChatTemplate
from edge.engine import protocol as msg
from edge.engine.client import EngineProcess
from edge.errors import InputError, RequestError
from edge.prompt import AddedTokens, Prompt
from edge.reasoning import THINK, THINK_END

# The status of a request whose client has left; nobody receives it.
GONE = 499
# Bytes of a text that is asked to be tokenized.
MAX_TEXT = 2**20
# Names of fields that a header may repeat.
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_IGNORED = 16


class ServedModel:
    """An artefact behind HTTP. name: its id in `model` fields. rendering: held while a prompt is rendered."""

    def __init__(self, artefact: Artefact | None, engine: EngineProcess, name: str) -> None:
        self.engine = engine
        self.name = name
        self.digest = artefact.digest if artefact else ""
        self.artefact = artefact
        self.thinking = artefact.thinking if artefact else None
        self.rendering = asyncio.Lock()

    @property
    def ready(self) -> BackendInfo:
        """What the engine has loaded. Raises RequestError (503) until it has."""
        if self.engine.failure is not None:
            raise RequestError(str(self.engine.failure), status=503, code="model_failed")
        if self.engine.ready is None:
            raise loading()
        return self.engine.ready

    @property
    def reasons(self) -> bool:
        """Whether the model writes its reasoning before an answer."""
        template = self.ready.chat_template or ""
        return THINK in template or THINK_END in template or self.thinking in ("on", "mixed")

    def template(self) -> ChatTemplate:
        """The model's chat template. Raises RequestError (400) where it has none, or not a valid one."""
        ready = self.ready
        if ready.chat_template is None:
            raise RequestError(
                f"{self.name} has no chat template",
                code="no_chat_template",
                param="messages",
                hint="ask with raw: true, or serve a model that has one",
            )
        file = self.engine.load.path or self.name
        try:
            return _compiled(ready.chat_template, ready.bos_text, ready.eos_text, ready.added, file)
        except InputError as error:
            raise RequestError(
                error.message, code="chat_template_error", param="messages", hint=error.hint
            ) from error

    def headers(self, ignored: Iterable[str] = ()) -> dict[str, str]:
        """Response headers: which model answers, on what device, and what of the request was ignored."""
        headers = {"x-edge-model": self.name, "x-edge-device": self.ready.device}
        if self.digest:
            headers["x-edge-digest"] = self.digest
        if names := [name for name in ignored if _PLAIN.fullmatch(name)][:_MOST_IGNORED]:
            headers["x-edge-ignored"] = ", ".join(names)
        # Header values are latin-1: a name with other characters is sent escaped.
        return {k: v.encode("ascii", "backslashreplace").decode("ascii") for k, v in headers.items()}

    async def encode(self, text: str | Prompt, *, special: bool, whole: bool = False) -> msg.Encoded:
        """Token ids and pieces of a client's `text`. Raises RequestError (413) for one over MAX_TEXT."""
        # Half of a surrogate pair is refused where the text is packed.
        size = len((text.text if isinstance(text, Prompt) else text).encode("utf-8", "surrogatepass"))
        if size > MAX_TEXT:
            raise RequestError(
                f"the text has {size} bytes, the most that is tokenized at once is {MAX_TEXT}",
                status=413,
                code="text_too_long",
                param="text",
                hint="send it in parts",
            )
        return await self.engine.encode(text, special=special, whole=whole)

    async def embed(self, request: Request, texts: list[str | list[int]]) -> list[msg.Embedded]:
        """The vector of each text, in order. Raises RequestError for an empty one, or a client that left."""
        vectors = []
        for i, text in enumerate(texts):
            if not text:
                raise RequestError(f"input[{i}] is empty", param="input")
            if await request.is_disconnected():
                raise RequestError("the client has gone", status=GONE, code="client_closed")
            vectors.append(await self.engine.embed(text))
        return vectors


@functools.lru_cache(maxsize=16)
def _compiled(template: str, bos: str, eos: str, tokens: AddedTokens, file: str) -> ChatTemplate:
    return ChatTemplate(template, tokens=tokens, bos=bos, eos=eos, file=file)


def floats(embedded: msg.Embedded) -> list[float]:
    """A vector as numbers; the engine sends it as little-endian float32."""
    return list(struct.unpack(f"<{len(embedded.vector) // 4}f", embedded.vector))


def loading() -> RequestError:
    return RequestError("the model is being loaded", status=503, code="model_loading", retry_after=1.0)


def shutting_down() -> RequestError:
    return RequestError("the server is shutting down", status=503, code="shutting_down")


def timings(done: msg.Done) -> dict[str, float]:
    """Seconds in the queue, in prefill and in decode; tokens per second of the latter two."""
    computed = done.prompt_tokens - done.cached_tokens
    # The first token comes out of the prefill.
    decoded = max(done.completion_tokens - 1, 0)
    return {
        "queue_s": round(done.queue_s, 4),
        "prefill_s": round(done.prefill_s, 4),
        "decode_s": round(done.decode_s, 4),
        "prefill_tokens_per_s": round(computed / done.prefill_s, 1) if done.prefill_s > 0 else 0.0,
        "decode_tokens_per_s": round(decoded / done.decode_s, 1) if done.decode_s > 0 else 0.0,
    }


def finish_reason(done: msg.Done) -> str:
    """stop or length. Raises RequestError: 408 after the request's own time limit, 503 in a shutdown."""
    if done.reason == "timeout":
        raise RequestError("the request ran out of its time", status=408, code="timeout", param="timeout")
    if done.reason == "cancelled":
        raise shutting_down()
    return done.reason
