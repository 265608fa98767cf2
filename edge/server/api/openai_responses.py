"""OpenAI's responses, without a memory: every request carries its whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.engine.grammar import Constraint, json_constraint
from edge.engine.sampling import Params
from edge.errors import RequestError
from edge.server.conversation import EFFORTS, Conversation, Reader, Turn, collect
from edge.server.model_registry import serving_for
from edge.server.request_fields import MAX_MESSAGES, Count, Function, Message, Share, Temperature, flat
from edge.server.served_model import Serving, finish_reason
from edge.server.streaming import Answer, EventStream, dump
from edge.server.tool_dialects import MAX_TOOLS, Call

router = APIRouter(prefix="/v1", tags=["openai"])

# What changes the answer and cannot be honoured.
_REFUSED = ("previous_response_id", "conversation", "prompt", "background", "max_tool_calls")


class FlatTool(Function):
    type: Literal["function"]


class Reasoning(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    effort: Literal["none", "minimal", "low", "medium", "high"] | None = None


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["function"]
    name: str


class Responses(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    stream: bool | None = None
    store: bool | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise RequestError for what cannot be honoured."""
        for name in _REFUSED:
            if (self.model_extra or {}).get(name):
                raise RequestError(
                    f"{name} is not supported: this server keeps nothing between requests",
                    code="unsupported",
                    param=name,
                )
        if self.store:
            raise RequestError(
                "store: true is not supported: this server keeps nothing", code="unsupported", param="store"
            )

    def params(self) -> Params:
        return Params(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            max_tokens=self.max_output_tokens,
        )

    def conversation(self) -> Conversation:
        choice = self.tool_choice or "auto"
        effort = self.reasoning.effort if self.reasoning else None
        return Conversation(
            self._messages(),
            tools=[one.tool() for one in self.tools or []],
            choice=choice if isinstance(choice, str) else choice.name,
            parallel=self.parallel_tool_calls is not False,
            thinking=False if effort == "none" else None,
            budget=EFFORTS.get(effort) if effort else None,
            constraint=self._constraint(),
        )

    def _constraint(self) -> Constraint | None:
        wanted: Any = (self.text or {}).get("format") or {"type": "text"}
        kind = wanted.get("type") if isinstance(wanted, dict) else wanted
        if kind == "text":
            return None
        if kind == "json_object":
            return json_constraint(True, "text.format")
        if kind == "json_schema":
            return json_constraint(wanted.get("schema"), "text.format.schema")
        raise RequestError(f"text.format of type {kind!r} is not known", code="unsupported", param="text")

    def _messages(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        if self.instructions:
            rows.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            rows.append({"role": "user", "content": self.input})
        else:
            for i, item in enumerate(self.input):
                _add(rows, item, f"input[{i}]")
        return flat([Message(**row) for row in rows])


def _add(rows: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """An item as a row of the older kind; calls that follow each other belong to one message."""
    kind = item.get("type", "message")
    try:
        if kind == "message":
            rows.append({"role": str(item["role"]), "content": _text(item["content"], where)})
        elif kind == "function_call":
            call = {"name": item["name"], "arguments": item["arguments"]}
            row = {"id": item["call_id"], "type": "function", "function": call}
            if rows and rows[-1]["role"] == "assistant":
                rows[-1].setdefault("tool_calls", []).append(row)
            else:
                rows.append({"role": "assistant", "content": "", "tool_calls": [row]})
        elif kind == "function_call_output":
            text = _text(item["output"], where)
            rows.append({"role": "tool", "content": text, "tool_call_id": item["call_id"]})
        elif kind != "reasoning":
            # A thought of an earlier turn is not shown to the model again, as templates have it.
            raise RequestError(f"{where} is of type {kind!r}, which is not supported", param=where)
    except KeyError as error:
        raise RequestError(f"{where} lacks {error}", param=where) from error


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(text, str):
            raise RequestError(f"{where} has a part of type {kind!r}; this is a text model", param=where)
        texts.append(text)
    return "".join(texts)


@router.post("/responses", summary="OpenAI's responses, stateless")
async def responses(request: Request, body: Responses) -> Response:
    body.check()
    asked, params = body.conversation(), body.params()
    serving = await serving_for(request, body.model)
    turn = Turn(serving, asked)
    [stream] = turn.start(params)
    shape = _Shape(serving, body)
    if body.stream:
        return _Events([stream], _events(shape, turn.reader(), stream), serving.headers())
    return Answer([stream], lambda: _answer(shape, turn.reader(), stream), serving.headers())


class _Shape:
    """The response object, as far as it is known."""

    def __init__(self, serving: Serving, body: Responses) -> None:
        self._base: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": serving.name,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.model_dump(exclude_none=True).get("tool_choice", "auto"),
            "tools": [tool.model_dump() for tool in body.tools or []],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
        }

    def begun(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "status": "in_progress",
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }
        return {**self._base, **body}

    def ended(self, output: list[dict[str, Any]], done: msg.Done) -> dict[str, Any]:
        cut = finish_reason(done) == "length"
        usage = {
            "input_tokens": done.prompt_tokens,
            "input_tokens_details": {"cached_tokens": done.cached_tokens},
            "output_tokens": done.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
            "total_tokens": done.prompt_tokens + done.completion_tokens,
        }
        return {
            **self._base,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": usage,
        }


def _item(kind: str, status: str) -> dict[str, Any]:
    """An output item that has nothing in it yet."""
    if kind == "reasoning":
        return {
            "type": kind,
            "id": f"rs_{secrets.token_hex(12)}",
            "status": status,
            "summary": [],
            "content": [],
        }
    return {
        "type": "message",
        "id": f"msg_{secrets.token_hex(12)}",
        "status": status,
        "role": "assistant",
        "content": [],
    }


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _called(call: Call, status: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{secrets.token_hex(12)}",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


async def _answer(shape: _Shape, reader: Reader | None, stream: Stream) -> dict[str, Any]:
    whole = await collect(stream, reader)
    output = []
    for kind, text in (("reasoning", whole.thought), ("message", whole.text)):
        if text or (kind == "message" and not whole.calls):
            output.append({**_item(kind, "completed"), "content": [_part(kind, text)]})
    output += [_called(call, "completed") for call in whole.calls]
    return shape.ended(output, whole.done)


class _Events(EventStream):
    def _failed(self, error: RequestError) -> bytes:
        body = {"type": "error", "code": error.code, "message": str(error), "param": error.param}
        return b"event: error\ndata: " + dump(body) + b"\n\n"


async def _events(shape: _Shape, reader: Reader | None, stream: Stream) -> AsyncIterator[bytes]:
    output = _Output()
    begun = False
    async for item in stream:
        chunk = b""
        if not begun:
            begun = True
            chunk = output.event("response.created", response=shape.begun())
            chunk += output.event("response.in_progress", response=shape.begun())
        last = isinstance(item, msg.Done)
        thought, text, calls = reader.push(item.text, last=last) if reader else ("", item.text, [])
        if thought:
            chunk += output.add("reasoning", thought)
        if text:
            chunk += output.add("message", text)
        for call in calls:
            chunk += output.call(call)
        if isinstance(item, msg.Done):
            if not output.items and not output.opened:
                chunk += output.add("message", "")
            chunk += output.close()
            whole = shape.ended(output.items, item)
            chunk += output.event(f"response.{whole['status']}", response=whole)
        if chunk:
            yield chunk


_NAMES = {"message": "response.output_text", "reasoning": "response.reasoning_text"}


class _Output:
    """The output items of a stream, opened and closed in order. items: those that are complete."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.opened: dict[str, Any] | None = None
        self._kind = ""
        self._text: list[str] = []
        self._number = 0

    def event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode("ascii") + b"\ndata: " + dump(body) + b"\n\n"

    def add(self, kind: str, text: str) -> bytes:
        chunk = b""
        if self.opened is None or self._kind != kind:
            chunk = self.close()
            self.opened, self._kind, self._text = _item(kind, "in_progress"), kind, []
            at = len(self.items)
            chunk += self.event("response.output_item.added", output_index=at, item=self.opened)
            chunk += self.event("response.content_part.added", **self._where(), part=_part(kind, ""))
        self._text.append(text)
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return chunk + self.event(f"{_NAMES[kind]}.delta", **self._where(), delta=text, **extra)

    def call(self, call: Call) -> bytes:
        chunk = self.close()
        at, whole = len(self.items), _called(call, "completed")
        begun = {**whole, "arguments": "", "status": "in_progress"}
        where = {"item_id": whole["id"], "output_index": at}
        chunk += self.event("response.output_item.added", output_index=at, item=begun)
        chunk += self.event("response.function_call_arguments.delta", **where, delta=call.arguments)
        done = {"arguments": call.arguments, "name": call.name}
        chunk += self.event("response.function_call_arguments.done", **where, **done)
        self.items.append(whole)
        return chunk + self.event("response.output_item.done", output_index=at, item=whole)

    def close(self) -> bytes:
        if self.opened is None:
            return b""
        text, kind, where = "".join(self._text), self._kind, self._where()
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        part = _part(kind, text)
        whole = {**self.opened, "status": "completed", "content": [part]}
        chunk = self.event(f"{_NAMES[kind]}.done", **where, text=text, **extra)
        chunk += self.event("response.content_part.done", **where, part=part)
        chunk += self.event("response.output_item.done", output_index=len(self.items), item=whole)
        self.items.append(whole)
        self.opened = None
        return chunk

    def _where(self) -> dict[str, Any]:
        assert self.opened is not None
        return {"item_id": self.opened["id"], "output_index": len(self.items), "content_index": 0}
