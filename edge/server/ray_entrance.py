"""What stands in front of Ray's proxy, in its process: ASGI that names sessions and ends what was torn off.

Ray's ConsistentHashRouter goes by the session in a header, which few clients send. The proxy itself answers
in plain text, or not at all, where a replica is gone.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.errors import RequestError
from edge.server import error_body
from edge.server.access import KEY_VARIABLE, Access, read_keys
from edge.server.api import anthropic, ollama, openai_responses
from edge.server.app import ERROR_BODIES
from edge.server.auth import MAX_BODY, Guard, too_large
from edge.server.metrics import CONTENT_TYPE, merged
from edge.server.streaming import openai_failure

# Names of Ray's application and of its deployment.
APP, DEPLOYMENT = "edge", "Replica"
# In the environment of Ray's processes it puts `middlewares` around the proxy.
VARIABLE, VALUE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "edge.server.ray_entrance:middlewares"
_SESSION = b"x-session-id"
# Their answers come from what the replicas told last: a request for them would wait for a slot.
_STATE = frozenset({"/health", "/ready", "/info", "/metrics"})
# Replica -> path -> its answer: a page, JSON or a RequestError. Ray's router in this process writes it.
states: dict[str, dict[str, Any]] = {}
# The path of --api-key-file, for the proxy's process.
KEY_FILE_VARIABLE = "EDGE_API_KEY_FILE"
# Characters of a raw prompt by which its session is told.
_BEGINNING = 256


class Entrance:
    """ASGI around Ray's proxy, in its process."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        file = os.environ.get(KEY_FILE_VARIABLE)
        keys = read_keys(Path(file) if file else None, KEY_VARIABLE)
        self._state_of_all = Guard(self._state, access=Access(tuple(keys)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(scope, send)
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD") and scope["path"] in _STATE:
            await self._state_of_all(_with_families(scope), receive, send)
            return
        elif scope["method"] == "POST":
            message = await _body(receive)
            if len(message["body"]) > MAX_BODY:
                await answer.refuse(too_large())
                return
            name = session(message["body"])
            if name and not any(key == _SESSION for key, _ in scope["headers"]):
                scope["headers"] = [*scope["headers"], (_SESSION, name.encode("ascii"))]
            await self._app(scope, _again(message, receive), answer)
        else:
            await self._app(scope, receive, answer)
        await answer.end()

    async def _state(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What the replicas said last: the best answer, and their metrics together."""
        path = scope["path"]
        answers = {name: pages[path] for name, pages in states.items() if path in pages}
        refused: list[Any] = [each for each in answers.values() if isinstance(each, RequestError)]
        whole = {name: each for name, each in answers.items() if not isinstance(each, RequestError)}
        if not whole:
            error = refused[0] if refused else _refusal(404)
            response = error_body.respond(scope, error)
        elif path == "/metrics":
            response = Response(merged(whole), headers={"content-type": CONTENT_TYPE})
        else:
            response = JSONResponse(next(iter(whole.values())))
        await response(scope, receive, send)


class _Answer:
    """A sender that knows how far an answer came, and ends one that was torn off."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._kind = ""
        self._status = 0
        self._ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            self._status = message["status"]
            if self._status >= 400 and headers.get("content-type", "").startswith("text/plain"):
                return  # Ray's own words
            self._kind = headers.get("content-type", "json")
            # The application has set the id that Ray's proxy adds.
            others = [row for row in message["headers"] if row[0].lower() != b"x-request-id"]
            name = headers.get("x-request-id", "").encode("latin-1")
            message = {**message, "headers": [*others, (b"x-request-id", name)]}
        elif not self._kind:
            return
        else:
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def end(self) -> None:
        """Close what ended too early: a replica died, or none could take the request."""
        if self._ended:
            return
        if not self._kind:
            await self.refuse(_refusal(self._status))
        elif "stream" in self._kind or "ndjson" in self._kind:
            body = _last_event(self._scope["path"], _refusal(0))
            await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, error: RequestError) -> None:
        self._ended = True
        scope = _with_families(self._scope)
        await error_body.respond(scope, error)(scope, _nothing, self._send)


def _refusal(status: int) -> RequestError:
    """What Ray's status means: 404 and 503 without a replica, 429 of a full queue, else one that died."""
    if status == 429:
        return RequestError("the queue is full", status=429, code="queue_full", retry_after=1.0)
    message, code = "the replica that worked on this request has ended; ask again", "replica_lost"
    if status in (404, 503):
        message, code = "no replica is ready to answer", "no_replica"
    return RequestError(message, status=503, code=code, retry_after=1.0)


def _last_event(path: str, error: RequestError) -> bytes:
    families = {
        anthropic.router.prefix: anthropic.failure,
        ollama.router.prefix: ollama.failure,
        "/v1/responses": openai_responses.failure,
        "/responses": openai_responses.failure,
    }
    return next((form for prefix, form in families.items() if path.startswith(prefix)), openai_failure)(error)


def session(body: bytes) -> str:
    """A name for the conversation that a request goes on with, or "".

    Conversations are told apart by what stands before their first answer: system prompt and first question. A
    raw prompt grows at its end, so its first characters tell.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    if not isinstance(fields, dict):
        return ""
    given = fields.get("messages") or fields.get("input") or fields.get("prompt")
    if isinstance(given, list):
        roles = [turn.get("role") if isinstance(turn, dict) else None for turn in given]
        given = given[: roles.index("user") + 1] if "user" in roles else given
    elif isinstance(given, str):
        given = given[:_BEGINNING]
    if not given:
        return ""
    beginning = msgspec.json.encode([fields.get("system"), fields.get("instructions"), given])
    return hashlib.sha256(beginning).hexdigest()[:32]


async def _body(receive: Receive) -> Message:
    """A request's whole body as one message; of one over MAX_BODY its beginning."""
    parts, size = [], 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY or not message.get("more_body", False):
            return {"type": "http.request", "body": b"".join(parts)}


def _again(message: Message, receive: Receive) -> Receive:
    """A receiver that begins with `message`."""
    waiting = [message]

    async def receiver() -> Message:
        return waiting.pop() if waiting else await receive()

    return receiver


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _with_families(scope: Scope) -> Scope:
    """The scope with what error bodies are found by; Ray's own scope has to be picklable."""
    return {**scope, "app": SimpleNamespace(state=SimpleNamespace(error_bodies=ERROR_BODIES))}


def middlewares() -> list[Middleware]:
    """What Ray's proxy puts around itself."""
    return [Middleware(Entrance)]
