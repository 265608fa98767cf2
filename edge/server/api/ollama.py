"""Ollama's interface, which many desktop programs speak: NDJSON streams, durations in nanoseconds.

Options about loading (num_ctx, num_gpu, num_thread ...) are settled by `edge serve` and have no effect here.
A prompt that does not fit is refused, never cut. Models are not pulled, made or deleted.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.engine.grammar import Constraint, json_constraint
from edge.engine.sampling import Params
from edge.errors import RequestError
from edge.server.conversation import AnswerReader, Conversation, collect, prepared
from edge.server.model_registry import registry_of, served_model
from edge.server.openai_objects import chat_logprobs
from edge.server.request_fields import (
    MAX_INPUTS,
    MAX_MESSAGES,
    MAX_TOKENS,
    Body,
    Floor,
    FunctionTools,
    Message,
    Part,
    PastCall,
    Penalty,
    Repetition,
    Role,
    Stop,
    Stops,
    Temperature,
    TopK,
    TopLogprobs,
    flat,
    sampling,
    stops,
)
from edge.server.served_model import ServedModel, finish_reason, floats
from edge.server.streaming import dump, respond
from edge.server.tool_dialects import Call

# Ollama's own defaults for what a request leaves open.
DEFAULT_TEMPERATURE, DEFAULT_TOP_K, DEFAULT_TOP_P = 0.8, 40, 0.9
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")
Lifetime = (
    Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)] | Annotated[str, Field(max_length=64)]
)
_NDJSON = "application/x-ndjson"
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {_NDJSON: {}}}}

router = APIRouter(prefix="/api", tags=["ollama"])


def error_body(error: RequestError) -> dict[str, Any]:
    """Ollama's error object."""
    return {"error": str(error)}


class Lax(Body):
    """A body as Ollama reads it: numbers may be texts."""

    model_config = ConfigDict(strict=False)


class Options(Lax):
    """Sampling options. An unknown one that would change the answer is refused."""

    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Floor | None = None
    min_p: Floor | None = None
    repeat_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    num_predict: Annotated[int, Field(ge=-2, le=MAX_TOKENS)] | None = None
    stop: Stop | Stops | None = None

    def params(self) -> Params:
        limit = self.num_predict
        params = sampling(
            self,
            temperature=DEFAULT_TEMPERATURE,
            top_k=DEFAULT_TOP_K,
            top_p=DEFAULT_TOP_P,
            repetition_penalty=self.repeat_penalty or 1.0,
            max_tokens=None if limit is None or limit < 1 else limit,
            stop=stops(self.stop),
        )
        # Ollama reads a top_p of 0 as "the best token alone", and a negative seed as none.
        seed = None if params.seed is None or params.seed < 0 else params.seed
        return msgspec.structs.replace(params, top_p=max(params.top_p, 1e-6), seed=seed)


class _Fields(Lax):
    model: Annotated[str, Field(min_length=1)]
    stream: bool = True
    options: Options = Field(default_factory=Options)
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: Lifetime | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0

    def params(self) -> Params:
        """Sampling parameters. Raises RequestError for top_logprobs without logprobs."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs goes with logprobs: true", param="top_logprobs")
        params = self.options.params()
        return msgspec.structs.replace(params, logprobs=self.top_logprobs) if self.logprobs else params

    def constraint(self) -> Constraint | None:
        if not self.format:
            return None
        return json_constraint(True if self.format == "json" else self.format, "format")

    def thinking(self, model: ServedModel) -> dict[str, Any]:
        """Keywords of `Conversation`. A model that does not reason may be told not to."""
        if self.think is None or (self.think is False and not model.reasons):
            return {}
        return {"thinking": bool(self.think)}


class Generate(_Fields):
    prompt: str = ""
    system: str | None = None
    raw: bool = False


class OllamaMessage(Part):
    model_config = ConfigDict(strict=False)

    role: Role
    content: str = ""
    thinking: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_name: str | None = None
    images: list[str] | None = None

    def message(self, where: str) -> Message:
        if self.images:
            raise RequestError(f"{where}.images: this is a text model", param=f"{where}.images")
        extra = {"reasoning_content": self.thinking, "name": self.tool_name, "tool_calls": self.tool_calls}
        given: dict[str, Any] = {name: value for name, value in extra.items() if value}
        return Message(role=self.role, content=self.content, **given)


class Chat(_Fields):
    messages: Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES)] = Field(default_factory=list)
    tools: FunctionTools | None = None


class Embed(Lax):
    model: str
    input: str | Annotated[list[str], Field(max_length=MAX_INPUTS)]
    truncate: bool | None = None
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: Lifetime | None = None


class EmbedOne(Lax):
    model: str
    prompt: str
    options: dict[str, Any] | None = None
    keep_alive: Lifetime | None = None


def seconds(given: float | str | None) -> float | None:
    """A keep_alive in seconds, from a number or a duration in Go's form ("1h30m"); negative: for good."""
    if given is None or isinstance(given, (int, float)):
        return given
    text = given.strip()
    sign, text = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
    if text.isdigit():
        return sign * min(float(text), 1e9)
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise RequestError(f"keep_alive '{given[:40]}' is no duration such as 5m", param="keep_alive")
    return sign * min(sum(float(number) * _UNITS[unit] for number, unit in parts), 1e9)


@router.post("/chat", summary="Ollama's chat", responses=_STREAMED)
async def chat(request: Request, body: Chat) -> Response:
    keep_alive, params, constraint = seconds(body.keep_alive), body.params(), body.constraint()
    began = time.monotonic_ns()
    if not body.messages:
        return await _load_only(request, body.model, keep_alive, {"message": _message("", "", [])})
    model = await served_model(request, body.model, keep_alive)
    asked = Conversation(
        flat([message.message(f"messages[{i}]") for i, message in enumerate(body.messages)]),
        tools=[tool.function.tool() for tool in body.tools or []],
        constraint=constraint,
        **body.thinking(model),
    )
    chat = await prepared(model, asked)
    [stream] = chat.start(params)
    return _respond(_ChatObjects(model, chat.reader(), began), stream, body)


@router.post("/generate", summary="Ollama's completion", responses=_STREAMED)
async def generate(request: Request, body: Generate) -> Response:
    keep_alive, params, constraint = seconds(body.keep_alive), body.params(), body.constraint()
    began = time.monotonic_ns()
    if not body.prompt:
        return await _load_only(request, body.model, keep_alive, {"response": ""})
    model = await served_model(request, body.model, keep_alive)
    if body.raw:
        stream, reader = model.engine.submit(body.prompt, params, constraint=constraint), AnswerReader()
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": body.prompt}]
        asked = Conversation(messages, constraint=constraint, **body.thinking(model))
        chat = await prepared(model, asked)
        [stream], reader = chat.start(params), chat.reader()
    return _respond(_GenerateObjects(model, reader, began), stream, body)


async def _load_only(
    request: Request, name: str, keep_alive: float | None, empty: dict[str, Any]
) -> Response:
    """A request without a prompt loads the model, or with a keep_alive of 0 unloads it."""
    registry = registry_of(request)
    if keep_alive == 0:
        await registry.unload(name)
    else:
        await registry.take(name, keep_alive=keep_alive)
    row = {"model": registry.entry(name).name, "created_at": _now(), **empty, "done": True}
    reason = "unload" if keep_alive == 0 else "load"
    return Response(dump({**row, "done_reason": reason}) + b"\n", media_type="application/json")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _message(text: str, reasoning: str, calls: list[Call]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning:
        message["thinking"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"function": {"name": call.name, "arguments": json.loads(call.arguments)}} for call in calls
        ]
    return message


class _ChatObjects:
    """The objects of one answer. began: when the request came, time.monotonic_ns()."""

    def __init__(self, model: ServedModel, reader: AnswerReader, began: int) -> None:
        self.model = model
        self.reader = reader
        self._began = began

    def part(self, text: str, reasoning: str, calls: list[Call]) -> dict[str, Any]:
        return {"message": _message(text, reasoning, calls)}

    def row(
        self, text: str, reasoning: str, calls: list[Call], logprobs: list[msg.Logprob] | None = None
    ) -> dict[str, Any]:
        part = self.part(text, reasoning, calls)
        if rows := chat_logprobs(logprobs):
            part["logprobs"] = rows["content"]
        return {"model": self.model.name, "created_at": _now(), **part, "done": False}

    def last(self, row: dict[str, Any], done: msg.Done) -> dict[str, Any]:
        total = time.monotonic_ns() - self._began
        spent = round((done.queue_s + done.prefill_s + done.decode_s) * 1e9)
        return {
            **row,
            "done": True,
            "done_reason": finish_reason(done),
            "total_duration": total,
            # The time before the engine had the request: the model may have been loaded for it.
            "load_duration": max(total - spent, 0),
            "prompt_eval_count": done.prompt_tokens,
            "prompt_eval_duration": round(done.prefill_s * 1e9),
            "eval_count": done.completion_tokens,
            "eval_duration": round(done.decode_s * 1e9),
        }


class _GenerateObjects(_ChatObjects):
    def part(self, text: str, reasoning: str, calls: list[Call]) -> dict[str, Any]:
        return {"response": text, "thinking": reasoning} if reasoning else {"response": text}


def _respond(objects: _ChatObjects, stream: Stream, body: _Fields) -> Response:
    return respond(
        [stream],
        objects.model.headers([*body.ignored, *body.options.ignored]),
        answer=lambda: _answer(objects, stream),
        events=_lines(objects, stream) if body.stream else None,
        failure=failure,
        content_type=_NDJSON,
    )


def failure(error: RequestError) -> bytes:
    """The last event of a stream that failed after it had begun."""
    return dump(error_body(error)) + b"\n"


async def _answer(objects: _ChatObjects, stream: Stream) -> dict[str, Any]:
    answer = await collect(stream, objects.reader)
    row = objects.row(answer.text, answer.reasoning, answer.calls, answer.logprobs)
    return objects.last(row, answer.done)


async def _lines(objects: _ChatObjects, stream: Stream) -> AsyncIterator[bytes]:
    async for item in stream:
        reasoning, text, calls = objects.reader.take(item)
        lines = b""
        if reasoning or text or calls or item.logprobs:
            lines = dump(objects.row(text, reasoning, calls, item.logprobs)) + b"\n"
        if isinstance(item, msg.Done):
            lines += dump(objects.last(objects.row("", "", []), item)) + b"\n"
        if lines:
            yield lines


@router.post("/embed", summary="Vectors of texts")
async def embed(request: Request, body: Embed) -> dict[str, Any]:
    """A text that is too long is refused, whatever `truncate` says: nothing is cut in silence."""
    began = time.monotonic_ns()
    model = await served_model(request, body.model, seconds(body.keep_alive))
    if body.dimensions not in (None, model.ready.embedding):
        raise RequestError(f"the vectors have {model.ready.embedding} dimensions", param="dimensions")
    texts: list[str | list[int]] = [body.input] if isinstance(body.input, str) else [*body.input]
    vectors = await model.embed(request, texts)
    return {
        "model": model.name,
        "embeddings": [floats(vector) for vector in vectors],
        "total_duration": time.monotonic_ns() - began,
        "load_duration": 0,
        "prompt_eval_count": sum(vector.tokens for vector in vectors),
    }


@router.post("/embeddings", summary="The vector of a text (older)")
async def embeddings(request: Request, body: EmbedOne) -> dict[str, Any]:
    model = await served_model(request, body.model, seconds(body.keep_alive))
    [vector] = await model.embed(request, [body.prompt])
    return {"embedding": floats(vector)}
