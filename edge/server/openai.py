"""OpenAI's chat completions, completions and models."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from edge import messages as msg
from edge.chat import THINK, ThoughtSplit, opens_thought
from edge.errors import RequestError
from edge.grammar import Constraint, json_constraint
from edge.server.fields import Count, Messages, Sampled, flat
from edge.server.live import DONE, Answer, EventStream, event
from edge.server.serving import Serving, finish_reason, usage
from edge.supervisor import Stream

DEFAULT_COMPLETION_TOKENS = 512

router = APIRouter(prefix="/v1", tags=["openai"])

# What changes the answer and is not honoured here is refused; what does not (user, metadata) is let pass.
_REFUSED = (
    "tools", "tool_choice", "functions", "function_call", "modalities", "audio",
    "prediction", "web_search_options", "suffix", "best_of", "guided_json", "guided_regex", "grammar",
)  # fmt: skip


class _OpenAI(Sampled):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    n: int | None = None
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    def constraint(self) -> Constraint | None:
        """What response_format asks for. Raises RequestError for a type that is not known."""
        wanted = self.response_format or {"type": "text"}
        kind = wanted.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return json_constraint(True, "response_format")
        inner = wanted.get("json_schema")
        if kind == "json_schema" and isinstance(inner, dict):
            return json_constraint(inner.get("schema"), "response_format.json_schema.schema")
        raise RequestError(
            f"response_format of type {kind!r} is not known", code="unsupported", param="response_format"
        )

    def check(self, serving: Serving) -> None:
        """Raise RequestError for what cannot be honoured."""
        if self.model is not None and self.model != serving.name:
            raise RequestError(
                f"the model '{self.model}' is not served here, '{serving.name}' is",
                status=404,
                code="model_not_found",
                param="model",
            )
        if self.n not in (None, 1):
            raise RequestError("n other than 1 is not supported", param="n")
        extra = self.model_extra or {}
        for name in _REFUSED:
            value = extra.get(name)
            if value in (None, [], "none", "auto", {"type": "text"}, ["text"]):
                continue
            raise RequestError(f"{name} is not supported", code="unsupported", param=name)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options goes with stream: true", param="stream_options")

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class ChatCompletion(_OpenAI):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Completion(_OpenAI):
    prompt: str | Annotated[list[int], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    serving: Serving = request.app.state.serving
    row = {"id": serving.name, "object": "model", "created": serving.created, "owned_by": "edge"}
    return {"object": "list", "data": [row]}


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatCompletion) -> Response:
    serving: Serving = request.app.state.serving
    body.check(serving)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs goes with logprobs: true", param="top_logprobs")
    extra = dict(body.chat_template_kwargs or {})
    reserved = {"messages", "add_generation_prompt", "bos_token", "eos_token", "thinking"} & set(extra)
    if reserved:
        raise RequestError(
            f"chat_template_kwargs may not set {sorted(reserved)}", param="chat_template_kwargs"
        )
    prompt = serving.prompt(flat(body.messages), **extra)
    params = body.params(
        temperature=1.0,
        max_tokens=body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    stream = serving.engine.submit(
        prompt,
        params,
        constraint=body.constraint(),
        **body.run(),
    )
    split = ThoughtSplit(inside=opens_thought(prompt)) if THINK in serving.template().source else None
    shape = _Shape(serving, "chat.completion", "chatcmpl")
    if body.stream:
        return EventStream(
            stream, lambda s: _chat_events(shape, s, split, body.include_usage), serving.headers()
        )
    return Answer(stream, lambda s: _chat_answer(shape, s, split), serving.headers())


@router.post("/completions")
async def completions(request: Request, body: Completion) -> Response:
    serving: Serving = request.app.state.serving
    body.check(serving)
    if body.echo:
        raise RequestError("echo is not supported", code="unsupported", param="echo")
    params = body.params(temperature=1.0, max_tokens=DEFAULT_COMPLETION_TOKENS, logprobs=body.logprobs)
    stream = serving.engine.submit(
        body.prompt,
        params,
        constraint=body.constraint(),
        **body.run(),
    )
    shape = _Shape(serving, "text_completion", "cmpl")
    if body.stream:
        return EventStream(stream, lambda s: _text_events(shape, s, body.include_usage), serving.headers())
    return Answer(stream, lambda s: _text_answer(shape, s), serving.headers())


class _Shape:
    """The fields that every object of one response shares."""

    def __init__(self, serving: Serving, kind: str, prefix: str) -> None:
        self._kind = kind
        self._base = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": serving.name,
            "system_fingerprint": serving.digest or None,
        }

    def whole(self, choice: dict[str, Any], done: msg.Done) -> dict[str, Any]:
        return {**self._base, "object": self._kind, "choices": [choice], "usage": usage(done)}

    def chunk(self, choice: dict[str, Any] | None, done: msg.Done | None = None) -> bytes:
        kind = "chat.completion.chunk" if self._kind == "chat.completion" else self._kind
        body = {**self._base, "object": kind, "choices": [] if choice is None else [choice]}
        if done is not None:
            body["usage"] = usage(done)
        return event(body)


async def _collect(stream: Stream) -> tuple[str, list[msg.Logprob], msg.Done]:
    text, logprobs = "", []
    async for item in stream:
        text += item.text
        logprobs += item.logprobs or []
    assert isinstance(item, msg.Done)
    return text, logprobs, item


async def _chat_answer(shape: _Shape, stream: Stream, split: ThoughtSplit | None) -> dict[str, Any]:
    text, logprobs, done = await _collect(stream)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if split is not None:
        first, last = split.push(text), split.finish()
        message["content"] = first[1] + last[1]
        message["reasoning_content"] = (first[0] + last[0]) or None
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _chat_logprobs(logprobs),
        "finish_reason": finish_reason(done),
    }
    return shape.whole(choice, done)


async def _chat_events(
    shape: _Shape, stream: Stream, split: ThoughtSplit | None, include_usage: bool
) -> AsyncIterator[bytes]:
    def chunk(delta: dict[str, Any], reason: str | None, logprobs: list[msg.Logprob] | None) -> bytes:
        return shape.chunk(
            {"index": 0, "delta": delta, "logprobs": _chat_logprobs(logprobs), "finish_reason": reason}
        )

    opening = True
    async for item in stream:
        thought, answer = split.push(item.text) if split else ("", item.text)
        if isinstance(item, msg.Done) and split:
            late = split.finish()
            thought, answer = thought + late[0], answer + late[1]
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if opening else {}
        if thought:
            delta["reasoning_content"] = thought
        if answer:
            delta["content"] = answer
        if delta or item.logprobs:
            yield chunk(delta, None, item.logprobs)
        opening = False
        if isinstance(item, msg.Done):
            tail = chunk({}, finish_reason(item), None)
            yield tail + (shape.chunk(None, item) if include_usage else b"") + DONE


async def _text_answer(shape: _Shape, stream: Stream) -> dict[str, Any]:
    text, logprobs, done = await _collect(stream)
    choice = {
        "index": 0,
        "text": text,
        "logprobs": _text_logprobs(logprobs, 0),
        "finish_reason": finish_reason(done),
    }
    return shape.whole(choice, done)


async def _text_events(shape: _Shape, stream: Stream, include_usage: bool) -> AsyncIterator[bytes]:
    shown = 0
    async for item in stream:
        if item.text or item.logprobs:
            logprobs = _text_logprobs(item.logprobs, shown)
            yield shape.chunk({"index": 0, "text": item.text, "logprobs": logprobs, "finish_reason": None})
            shown += len(item.text)
        if isinstance(item, msg.Done):
            tail = shape.chunk(
                {"index": 0, "text": "", "logprobs": None, "finish_reason": finish_reason(item)}
            )
            yield tail + (shape.chunk(None, item) if include_usage else b"") + DONE


def _token(piece: bytes) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "bytes": list(piece)}


def _chat_logprobs(logprobs: list[msg.Logprob] | None) -> dict[str, Any] | None:
    if not logprobs:
        return None
    rows = [
        {
            **_token(entry.token),
            "logprob": entry.logprob,
            "top_logprobs": [{**_token(piece), "logprob": value} for piece, value in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": rows, "refusal": None}


def _text_logprobs(logprobs: list[msg.Logprob] | None, offset: int) -> dict[str, Any] | None:
    if not logprobs:
        return None
    tokens = [entry.token.decode("utf-8", "replace") for entry in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    tops = [{piece.decode("utf-8", "replace"): value for piece, value in entry.top} for entry in logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
