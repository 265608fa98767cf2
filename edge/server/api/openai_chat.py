"""OpenAI's chat completions, and the list of models."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.engine.grammar import Constraint, json_constraint
from edge.errors import RequestError
from edge.server.conversation import Conversation, Reader, Turn, collect, merged
from edge.server.model_registry import Registry, serving_for
from edge.server.openai_objects import Shape, chat_logprobs, usage
from edge.server.request_fields import Count, Function, Messages, Sampled, Thinking, flat
from edge.server.served_model import finish_reason
from edge.server.streaming import DONE, Answer, EventStream, dump
from edge.server.tool_dialects import MAX_TOOLS, Call

MAX_CHOICES = 16

router = APIRouter(prefix="/v1", tags=["openai"])

# What changes the answer and cannot be honoured is refused; what does not (user, metadata) is let pass.
_REFUSED = ("modalities", "audio", "prediction", "web_search_options", "suffix", "functions", "function_call")


class OpenAI(Sampled):
    """Fields of both kinds of completions. guided_*: vLLM's names for what an answer must match."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=256)] | None = None
    guided_grammar: str | None = None

    def constraint(self) -> Constraint | None:
        """What the answer must match. Raises RequestError for a type that is not known, or for several."""
        found = [c for c in (self._format(), *self._guided()) if c is not None]
        if len(found) > 1:
            raise RequestError(f"give one of {found[0].param} and {found[1].param}", param=found[1].param)
        return found[0] if found else None

    def _format(self) -> Constraint | None:
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

    def _guided(self) -> list[Constraint]:
        found = []
        if (schema := self.guided_json) is not None:
            if isinstance(schema, str):
                try:
                    schema = json.loads(schema)
                except ValueError as error:
                    raise RequestError(f"guided_json is not JSON: {error}", param="guided_json") from error
            found.append(json_constraint(schema, "guided_json"))
        if self.guided_regex is not None:
            found.append(Constraint("regex", self.guided_regex, "guided_regex"))
        if self.guided_choice is not None:
            found.append(json_choice(self.guided_choice))
        if self.guided_grammar is not None:
            found.append(Constraint("lark", self.guided_grammar, "guided_grammar"))
        return found

    def check(self) -> None:
        """Raise RequestError for what cannot be honoured."""
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


def json_choice(choices: list[str]) -> Constraint:
    """A constraint to answer with one of `choices`."""
    rows = " | ".join(dump(choice).decode("utf-8") for choice in choices)
    return Constraint("lark", f"start: {rows}", "guided_choice")


class FunctionTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["function"]
    function: NamedFunction


class ChatCompletion(OpenAI, Thinking):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def conversation(self) -> Conversation:
        choice = self.tool_choice or "auto"
        return Conversation(
            flat(self.messages),
            tools=[one.function.tool() for one in self.tools or []],
            choice=choice if isinstance(choice, str) else choice.function.name,
            parallel=self.parallel_tool_calls is not False,
            constraint=self.constraint(),
            **self.thinking(),
        )


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    registry: Registry = request.app.state.registry
    return {"object": "list", "data": [_model(registry, name) for name in registry.names]}


@router.get("/models/{name}")
async def one_model(request: Request, name: str) -> dict[str, Any]:
    registry: Registry = request.app.state.registry
    return _model(registry, registry.known(name).name)


def _model(registry: Registry, name: str) -> dict[str, Any]:
    known = registry.known(name)
    return {
        "id": name,
        "object": "model",
        "created": known.created,
        "owned_by": "edge",
        "digest": known.digest or None,
        "loaded": known.serving is not None,
    }


@router.post("/chat/completions")
async def chat_completions(request: Request, body: ChatCompletion) -> Response:
    body.check()
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs goes with logprobs: true", param="top_logprobs")
    asked = body.conversation()
    params = body.params(
        temperature=1.0,
        max_tokens=body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    serving = await serving_for(request, body.model)
    turn = Turn(serving, asked)
    streams = turn.start(params, body.n or 1, **body.run())
    shape = Shape(serving, "chat.completion", "chatcmpl")
    if not body.stream:
        return Answer(streams, lambda: _answer(shape, turn, streams), serving.headers())
    if len(streams) == 1:
        events = _events(shape, turn.reader(), streams[0], body.include_usage)
    else:
        events = _many(shape, turn, streams, body.include_usage)
    return EventStream(streams, events, serving.headers())


async def _answer(shape: Shape, turn: Turn, streams: list[Stream]) -> dict[str, Any]:
    choices, dones = [], []
    for index, stream in enumerate(streams):
        reader = turn.reader()
        whole = await collect(stream, reader)
        message: dict[str, Any] = {"role": "assistant", "content": whole.text}
        if turn.splits:
            message["reasoning_content"] = whole.thought or None
        if whole.calls:
            message["content"] = whole.text or None
            message["tool_calls"] = [_call(call) for call in whole.calls]
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(whole.logprobs),
                "finish_reason": _reason(whole.done, called=bool(whole.calls)),
            }
        )
        dones.append(whole.done)
    return shape.whole(choices, usage(dones))


async def _events(
    shape: Shape, reader: Reader | None, stream: Stream, include_usage: bool
) -> AsyncIterator[bytes]:
    choice = _Choice(shape, reader, 0)
    async for item in stream:
        chunk = choice.take(item)
        if isinstance(item, msg.Done):
            chunk += (shape.chunk(None, usage([item])) if include_usage else b"") + DONE
        if chunk:
            yield chunk


async def _many(shape: Shape, turn: Turn, streams: list[Stream], include_usage: bool) -> AsyncIterator[bytes]:
    choices = [_Choice(shape, turn.reader(), i) for i in range(len(streams))]
    dones: dict[int, msg.Done] = {}
    async for i, item in merged(streams):
        chunk = choices[i].take(item)
        if isinstance(item, msg.Done):
            dones[i] = item
        if len(dones) == len(streams):
            last = usage([dones[k] for k in sorted(dones)])
            chunk += (shape.chunk(None, last) if include_usage else b"") + DONE
        if chunk:
            yield chunk


class _Choice:
    """One choice of a stream: what the engine says, as chunks."""

    def __init__(self, shape: Shape, reader: Reader | None, index: int) -> None:
        self._shape = shape
        self._reader = reader
        self._index = index
        self._calls = 0
        self._opened = False

    def take(self, item: msg.Delta | msg.Done) -> bytes:
        last = isinstance(item, msg.Done)
        thought, answer, calls = "", item.text, list[Call]()
        if self._reader is not None:
            thought, answer, calls = self._reader.push(item.text, last=last)
        if self._opened and not calls and not last and item.logprobs is None:
            chunk = self._shape.text(self._index, "reasoning_content", thought) if thought else b""
            return chunk + (self._shape.text(self._index, "content", answer) if answer else b"")
        delta: dict[str, Any] = {} if self._opened else {"role": "assistant", "content": ""}
        self._opened = True
        if thought:
            delta["reasoning_content"] = thought
        if answer:
            delta["content"] = answer
        if calls:
            delta["tool_calls"] = [{"index": self._calls + i, **_call(call)} for i, call in enumerate(calls)]
            self._calls += len(calls)
        chunk = self._chunk(delta, None, item.logprobs) if delta or item.logprobs else b""
        if isinstance(item, msg.Done):
            chunk += self._chunk({}, _reason(item, called=self._calls > 0), None)
        return chunk

    def _chunk(self, delta: dict[str, Any], reason: str | None, logprobs: list[msg.Logprob] | None) -> bytes:
        choice = {"index": self._index, "delta": delta, "logprobs": chat_logprobs(logprobs)}
        return self._shape.chunk({**choice, "finish_reason": reason})


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _reason(done: msg.Done, *, called: bool) -> str:
    reason = finish_reason(done)
    return "tool_calls" if called and reason == "stop" else reason
