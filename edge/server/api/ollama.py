"""Ollama's interface, which many desktop programs speak: NDJSON streams, durations in nanoseconds.

What of Ollama's options is about loading (num_ctx, num_gpu, num_thread ...) is settled when serving and has
no effect here: a prompt that does not fit is refused, never cut. Models are not pulled, made or deleted.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.engine.grammar import Constraint, json_constraint
from edge.engine.sampling import Params
from edge.errors import RequestError
from edge.reasoning import THINK
from edge.server.api.openai_chat import FunctionTool
from edge.server.api.openai_embeddings import MAX_INPUTS, embed_all, floats
from edge.server.conversation import Conversation, Reader, Turn, collect
from edge.server.model_registry import Registry
from edge.server.request_fields import (
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOKENS,
    Floor,
    Message,
    Penalty,
    Repetition,
    Stop,
    Temperature,
    TopK,
    flat,
)
from edge.server.served_model import Serving, finish_reason
from edge.server.streaming import Answer, EventStream, dump
from edge.server.tool_dialects import MAX_TOOLS, Call

# Ollama's own defaults for what a request leaves open.
DEFAULT_TEMPERATURE, DEFAULT_TOP_K, DEFAULT_TOP_P = 0.8, 40, 0.9
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")
Lifetime = (
    Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)] | Annotated[str, Field(max_length=64)]
)

router = APIRouter(prefix="/api", tags=["ollama"])


class Options(BaseModel):
    """Sampling options. What is not named here and would change the answer is refused."""

    model_config = ConfigDict(extra="allow")

    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Floor | None = None
    min_p: Floor | None = None
    repeat_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    num_predict: Annotated[int, Field(ge=-2, le=MAX_TOKENS)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None

    def params(self) -> Params:
        extra = self.model_extra or {}
        for name, neutral in (("mirostat", 0), ("typical_p", 1.0), ("tfs_z", 1.0)):
            if extra.get(name, neutral) != neutral:
                raise RequestError(f"options.{name} is not supported", code="unsupported", param=name)
        if self.repeat_penalty not in (None, 1.0) and extra.get("repeat_last_n", -1) != -1:
            raise RequestError(
                "options.repeat_last_n other than -1 is not supported: the penalty looks at everything",
                code="unsupported",
                param="repeat_last_n",
            )
        limit = self.num_predict
        return Params(
            temperature=DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            top_k=DEFAULT_TOP_K if self.top_k is None else self.top_k,
            # Ollama takes 0 for "the best token alone".
            top_p=DEFAULT_TOP_P if self.top_p is None else max(self.top_p, 1e-6),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repeat_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None or self.seed < 0 else self.seed,
            max_tokens=None if limit is None or limit < 1 else limit,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or [],
        )


class _Asked(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(min_length=1)]
    stream: bool = True
    options: Options = Field(default_factory=Options)
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: Lifetime | None = None

    def constraint(self) -> Constraint | None:
        if not self.format:
            return None
        return json_constraint(True if self.format == "json" else self.format, "format")

    def thinking(self, serving: Serving) -> dict[str, Any]:
        """Keywords of `Conversation`. No thought may be asked of a model that has none."""
        if self.think is None or (self.think is False and not thinks(serving)):
            return {}
        return {"thinking": bool(self.think)}

    def refuse(self, *names: str) -> None:
        for name in names:
            if (self.model_extra or {}).get(name):
                raise RequestError(f"{name} is not supported", code="unsupported", param=name)


class Generate(_Asked):
    prompt: str = ""
    system: str | None = None
    raw: bool = False


class OllamaFunction(BaseModel):
    name: str
    arguments: dict[str, Any] | str = Field(default_factory=dict)


class OllamaCall(BaseModel):
    function: OllamaFunction


class Turned(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str = ""
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    images: list[str] | None = None

    def message(self, where: str) -> Message:
        if self.images:
            raise RequestError(f"{where}.images: this is a text model", param=f"{where}.images")
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking:
            row["reasoning_content"] = self.thinking
        if self.tool_name:
            row["name"] = self.tool_name
        if self.tool_calls:
            row["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return Message(**row)


class Chat(_Asked):
    messages: Annotated[list[Turned], Field(max_length=MAX_MESSAGES)] = Field(default_factory=list)
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None


class Embed(BaseModel):
    model: str
    input: str | Annotated[list[str], Field(max_length=MAX_INPUTS)]
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: Lifetime | None = None


class EmbedOne(BaseModel):
    model: str
    prompt: str
    keep_alive: Lifetime | None = None


def thinks(serving: Serving) -> bool:
    template = serving.ready.chat_template or ""
    return THINK in template or serving.thinking in ("on", "mixed")


def seconds(given: float | str | None) -> float | None:
    """A keep_alive: seconds, or a duration as Go writes it ("5m", "1h30m"); negative means for good."""
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


@router.post("/chat", summary="Ollama's chat")
async def chat(request: Request, body: Chat) -> Response:
    keep_alive, params, constraint = seconds(body.keep_alive), body.options.params(), body.constraint()
    began = time.monotonic_ns()
    if not body.messages:
        return await _load_only(request, body.model, keep_alive, {"message": _message("", "", [])})
    serving = await taken(request, body.model, keep_alive)
    asked = Conversation(
        flat([turned.message(f"messages[{i}]") for i, turned in enumerate(body.messages)]),
        tools=[one.function.tool() for one in body.tools or []],
        constraint=constraint,
        **body.thinking(serving),
    )
    turn = Turn(serving, asked)
    [stream] = turn.start(params)
    return _respond(_Chat(serving, turn.reader(), began), stream, body.stream)


@router.post("/generate", summary="Ollama's completion")
async def generate(request: Request, body: Generate) -> Response:
    body.refuse("images", "suffix", "template", "context")
    keep_alive, params, constraint = seconds(body.keep_alive), body.options.params(), body.constraint()
    began = time.monotonic_ns()
    if not body.prompt:
        return await _load_only(request, body.model, keep_alive, {"response": ""})
    serving = await taken(request, body.model, keep_alive)
    if body.raw:
        stream, reader = serving.engine.submit(body.prompt, params, constraint=constraint), None
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": body.prompt}]
        turn = Turn(serving, Conversation(messages, constraint=constraint, **body.thinking(serving)))
        [stream] = turn.start(params)
        reader = turn.reader()
    return _respond(_Generate(serving, reader, began), stream, body.stream)


async def taken(request: Request, model: str, keep_alive: float | None) -> Serving:
    """The model of that id, loaded. Raises RequestError (see `Registry.take`)."""
    registry: Registry = request.app.state.registry
    serving = await registry.take(model, keep_alive=keep_alive)
    request.state.model = serving.name
    return serving


async def _load_only(
    request: Request, model: str, keep_alive: float | None, empty: dict[str, Any]
) -> Response:
    """Nothing was asked: the model is loaded, or with a keep_alive of 0 let go."""
    registry: Registry = request.app.state.registry
    if keep_alive == 0:
        await registry.unload(model)
    else:
        await registry.take(model, keep_alive=keep_alive)
    row = {"model": registry.known(model).name, "created_at": _now(), **empty, "done": True}
    reason = "unload" if keep_alive == 0 else "load"
    return Response(dump({**row, "done_reason": reason}) + b"\n", media_type="application/json")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _message(text: str, thought: str, calls: list[Call]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["thinking"] = thought
    if calls:
        message["tool_calls"] = [
            {"function": {"name": call.name, "arguments": json.loads(call.arguments)}} for call in calls
        ]
    return message


class _Chat:
    """The objects of one answer. began: when the request came, time.monotonic_ns()."""

    def __init__(self, serving: Serving, reader: Reader | None, began: int) -> None:
        self.serving = serving
        self.reader = reader
        self._began = began

    def part(self, text: str, thought: str, calls: list[Call]) -> dict[str, Any]:
        return {"message": _message(text, thought, calls)}

    def row(self, text: str, thought: str, calls: list[Call]) -> dict[str, Any]:
        part = self.part(text, thought, calls)
        return {"model": self.serving.name, "created_at": _now(), **part, "done": False}

    def last(self, row: dict[str, Any], done: msg.Done) -> dict[str, Any]:
        total = time.monotonic_ns() - self._began
        spent = round((done.queue_s + done.prefill_s + done.decode_s) * 1e9)
        return {
            **row,
            "done": True,
            "done_reason": finish_reason(done),
            "total_duration": total,
            # What passed before the engine had the request: the model may have been loaded for it.
            "load_duration": max(total - spent, 0),
            "prompt_eval_count": done.prompt_tokens,
            "prompt_eval_duration": round(done.prefill_s * 1e9),
            "eval_count": done.completion_tokens,
            "eval_duration": round(done.decode_s * 1e9),
        }


class _Generate(_Chat):
    def part(self, text: str, thought: str, calls: list[Call]) -> dict[str, Any]:
        return {"response": text, "thinking": thought} if thought else {"response": text}


class _Lines(EventStream):
    content_type = b"application/x-ndjson"

    def _failed(self, error: RequestError) -> bytes:
        return dump({"error": str(error)}) + b"\n"


def _respond(shape: _Chat, stream: Stream, streamed: bool) -> Response:
    headers = shape.serving.headers()
    if streamed:
        return _Lines([stream], _lines(shape, stream), headers)
    return Answer([stream], lambda: _answer(shape, stream), headers)


async def _answer(shape: _Chat, stream: Stream) -> dict[str, Any]:
    whole = await collect(stream, shape.reader)
    return shape.last(shape.row(whole.text, whole.thought, whole.calls), whole.done)


async def _lines(shape: _Chat, stream: Stream) -> AsyncIterator[bytes]:
    reader = shape.reader
    async for item in stream:
        last = isinstance(item, msg.Done)
        thought, text, calls = reader.push(item.text, last=last) if reader else ("", item.text, [])
        lines = dump(shape.row(text, thought, calls)) + b"\n" if thought or text or calls else b""
        if isinstance(item, msg.Done):
            lines += dump(shape.last(shape.row("", "", []), item)) + b"\n"
        if lines:
            yield lines


@router.post("/embed", summary="Vectors of texts")
async def embed(request: Request, body: Embed) -> dict[str, Any]:
    """A text that is too long is refused, whatever `truncate` says: nothing is cut in silence."""
    began = time.monotonic_ns()
    serving = await taken(request, body.model, seconds(body.keep_alive))
    if body.dimensions not in (None, serving.ready.embedding):
        raise RequestError(f"the vectors have {serving.ready.embedding} dimensions", param="dimensions")
    texts: list[str | list[int]] = [body.input] if isinstance(body.input, str) else [*body.input]
    found = await embed_all(request, serving, texts)
    return {
        "model": serving.name,
        "embeddings": [floats(one) for one in found],
        "total_duration": time.monotonic_ns() - began,
        "load_duration": 0,
        "prompt_eval_count": sum(one.tokens for one in found),
    }


@router.post("/embeddings", summary="The vector of a text (older)")
async def embeddings(request: Request, body: EmbedOne) -> dict[str, Any]:
    serving = await taken(request, body.model, seconds(body.keep_alive))
    [found] = await embed_all(request, serving, [body.prompt])
    return {"embedding": floats(found)}
