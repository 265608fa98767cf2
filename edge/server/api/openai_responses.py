"""OpenAI's responses, without a memory: every request carries its whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.errors import RequestError
from edge.server.conversation import EFFORTS, AnswerReader, Conversation, collect, prepared
from edge.server.model_registry import served_model
from edge.server.request_fields import (
    MAX_MESSAGES,
    Body,
    Count,
    Effort,
    Function,
    Part,
    Share,
    Temperature,
    answer_format,
    flat_row,
    sampling,
    text_of,
)
from edge.server.served_model import ServedModel, finish_reason
from edge.server.streaming import SSE, named_event, respond
from edge.server.tool_dialects import MAX_TOOLS, Call, chosen

router = APIRouter(prefix="/v1", tags=["openai"])

# Tools that OpenAI's servers run, or whose input is no JSON. To be offered one makes no model call it.
_LEFT_OUT = ("custom", "web_search", "web_search_preview")
_TEXT_PARTS = ("input_text", "output_text", "text")


class FlatTool(Function):
    type: Literal["function"]


class Reasoning(Part):
    effort: Effort | None = None


class NamedTool(Part):
    type: Literal["function"]
    name: str


class AllowedTools(Part):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


def _offered(tools: Any) -> Any:
    """The tools that this model may call."""
    if not isinstance(tools, list):
        return tools
    return [tool for tool in tools if not (isinstance(tool, dict) and tool.get("type") in _LEFT_OUT)]


class Responses(Body):
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    stream: bool | None = None
    store: bool | None = None
    tools: Annotated[list[FlatTool] | None, Field(max_length=MAX_TOOLS), BeforeValidator(_offered)] = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, Any] | None = None

    def conversation(self) -> Conversation:
        choice, tools = self.tool_choice or "auto", [tool.tool() for tool in self.tools or []]
        if isinstance(choice, AllowedTools):
            tools = chosen(tools, [tool.name for tool in choice.tools])
            choice = choice.mode
        effort = self.reasoning.effort if self.reasoning else None
        wanted = (self.text or {}).get("format") or None
        return Conversation(
            self._messages(),
            tools=tools,
            choice=choice if isinstance(choice, str) else choice.name,
            parallel=self.parallel_tool_calls is not False,
            thinking=False if effort == "none" else None,
            budget=EFFORTS.get(effort) if effort else None,
            constraint=answer_format(wanted, "text.format", "text.format.schema"),
        )

    def _messages(self) -> list[dict[str, Any]]:
        rows: list[tuple[str, dict[str, Any]]] = []
        if self.instructions:
            rows.append(("instructions", {"role": "system", "content": self.instructions}))
        if isinstance(self.input, str):
            rows.append(("input", {"role": "user", "content": self.input}))
        else:
            for i, item in enumerate(self.input):
                _add(rows, item, f"input[{i}]")
        return [flat_row(row, where) for where, row in rows]


def _add(rows: list[tuple[str, dict[str, Any]]], item: dict[str, Any], where: str) -> None:
    """Append an item as a message in the form of chat completions; calls in a row share one message."""
    kind = item.get("type", "message")
    try:
        if kind == "message":
            text = text_of(item["content"], where, _TEXT_PARTS)
            rows.append((where, {"role": item["role"], "content": text}))
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            if not rows or rows[-1][1]["role"] != "assistant":
                rows.append((where, {"role": "assistant", "content": ""}))
            calls = rows[-1][1].setdefault("tool_calls", [])
            calls.append({"id": item["call_id"], "type": "function", "function": function})
        elif kind == "function_call_output":
            text = text_of(item["output"], where, _TEXT_PARTS)
            rows.append((where, {"role": "tool", "content": text, "tool_call_id": item["call_id"]}))
        elif kind != "reasoning":
            # Chat templates leave out the reasoning of earlier answers, so a reasoning item is skipped.
            raise RequestError(f"{where} is of type {kind!r}, which is not supported", param=where)
    except KeyError as error:
        raise RequestError(f"{where} lacks {error}", param=where) from error


@router.post("/responses", summary="OpenAI's responses, stateless", responses=SSE)
async def responses(request: Request, body: Responses) -> Response:
    if body.store:
        raise RequestError("this server keeps nothing between requests", code="unsupported", param="store")
    asked, params = body.conversation(), sampling(body, max_tokens=body.max_output_tokens)
    model = await served_model(request, body.model)
    chat = await prepared(model, asked)
    [stream] = chat.start(params)
    response = _ResponseObject(model, body)
    return respond(
        [stream],
        model.headers(body.ignored),
        answer=lambda: _answer(response, chat.reader(), stream),
        events=_events(response, chat.reader(), stream) if body.stream else None,
        failure=failure,
    )


class _ResponseObject:
    """The response object, as far as it is known."""

    def __init__(self, model: ServedModel, body: Responses) -> None:
        self._base: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model.name,
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
        return {
            **self._base,
            "status": "in_progress",
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }

    def ended(self, output: list[dict[str, Any]], done: msg.Done) -> dict[str, Any]:
        cut = finish_reason(done) == "length"
        return {
            **self._base,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": {
                "input_tokens": done.prompt_tokens,
                "input_tokens_details": {"cached_tokens": done.cached_tokens},
                "output_tokens": done.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
                "total_tokens": done.prompt_tokens + done.completion_tokens,
            },
        }


def _item(kind: str, status: str, *content: dict[str, Any]) -> dict[str, Any]:
    """An output item: a message, or reasoning."""
    extra: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
    prefix = "rs" if kind == "reasoning" else "msg"
    return {
        "type": kind,
        "id": f"{prefix}_{secrets.token_hex(12)}",
        "status": status,
        **extra,
        "content": [*content],
    }


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: Call) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{secrets.token_hex(12)}",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


async def _answer(response: _ResponseObject, reader: AnswerReader, stream: Stream) -> dict[str, Any]:
    answer = await collect(stream, reader)
    output = []
    if answer.reasoning:
        output.append(_item("reasoning", "completed", _part("reasoning", answer.reasoning)))
    if answer.text or not answer.calls:
        output.append(_item("message", "completed", _part("message", answer.text)))
    output += [_call_item(call) for call in answer.calls]
    return response.ended(output, answer.done)


def failure(error: RequestError) -> bytes:
    """The last event of a stream that failed after it had begun."""
    return named_event({"type": "error", "code": error.code, "message": str(error), "param": error.param})


async def _events(response: _ResponseObject, reader: AnswerReader, stream: Stream) -> AsyncIterator[bytes]:
    output = _Output()
    begun = False
    async for item in stream:
        chunk = b""
        if not begun:
            begun = True
            chunk = output.event("response.created", response=response.begun())
            chunk += output.event("response.in_progress", response=response.begun())
        reasoning, text, calls = reader.take(item)
        if reasoning:
            chunk += output.add("reasoning", reasoning)
        if text:
            chunk += output.add("message", text)
        for call in calls:
            chunk += output.call(call)
        if isinstance(item, msg.Done):
            if not output.items and not output.opened:
                chunk += output.add("message", "")
            chunk += output.close()
            whole = response.ended(output.items, item)
            chunk += output.event(f"response.{whole['status']}", response=whole)
        if chunk:
            yield chunk


_NAMES = {"message": "response.output_text", "reasoning": "response.reasoning_text"}
# What the events of a text have besides it.
_EXTRA: dict[str, dict[str, Any]] = {"message": {"logprobs": []}, "reasoning": {}}


class _Output:
    """The output items of a stream, opened and closed in order. items: those that are complete."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.opened: dict[str, Any] | None = None
        self._text: list[str] = []
        self._number = 0

    def event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return named_event({"type": kind, "sequence_number": self._number - 1, **fields})

    def add(self, kind: str, text: str) -> bytes:
        """The events for more text of an item of this kind, which is opened where it is not."""
        chunk = b""
        if self.opened is None or self.opened["type"] != kind:
            chunk = self.close()
            self.opened, self._text = _item(kind, "in_progress"), []
            chunk += self._added(self.opened)
            chunk += self.event("response.content_part.added", **self._where(), part=_part(kind, ""))
        self._text.append(text)
        return chunk + self.event(f"{_NAMES[kind]}.delta", **self._where(), delta=text, **_EXTRA[kind])

    def call(self, call: Call) -> bytes:
        """The events of a whole tool call."""
        chunk, item = self.close(), _call_item(call)
        where = {"item_id": item["id"], "output_index": len(self.items)}
        chunk += self._added({**item, "arguments": "", "status": "in_progress"})
        chunk += self.event("response.function_call_arguments.delta", **where, delta=call.arguments)
        done = {"arguments": call.arguments, "name": call.name}
        chunk += self.event("response.function_call_arguments.done", **where, **done)
        return chunk + self._done(item)

    def close(self) -> bytes:
        """The events that end the open item."""
        if self.opened is None:
            return b""
        text, kind, where = "".join(self._text), self.opened["type"], self._where()
        part = _part(kind, text)
        chunk = self.event(f"{_NAMES[kind]}.done", **where, text=text, **_EXTRA[kind])
        chunk += self.event("response.content_part.done", **where, part=part)
        item, self.opened = {**self.opened, "status": "completed", "content": [part]}, None
        return chunk + self._done(item)

    def _added(self, item: dict[str, Any]) -> bytes:
        return self.event("response.output_item.added", output_index=len(self.items), item=item)

    def _done(self, item: dict[str, Any]) -> bytes:
        self.items.append(item)
        return self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _where(self) -> dict[str, Any]:
        assert self.opened is not None
        return {"item_id": self.opened["id"], "output_index": len(self.items), "content_index": 0}
