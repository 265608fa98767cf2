"""Anthropic's messages, streamed in its order of events, and the count of a conversation's tokens."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.engine.grammar import Constraint, json_constraint
from edge.engine.sampling import Params
from edge.errors import RequestError
from edge.server import error_body
from edge.server.conversation import Conversation, Reader, Turn, collect
from edge.server.model_registry import serving_for
from edge.server.request_fields import (
    MAX_CALLS,
    MAX_MESSAGES,
    MAX_TOKENS,
    Count,
    Floor,
    Message,
    Share,
    Stop,
    TopK,
    flat,
)
from edge.server.served_model import Serving, finish_reason
from edge.server.streaming import Answer, EventStream, dump
from edge.server.tool_dialects import MAX_TOOLS, Call, Tool

PATH = "/v1/messages"
MAX_STOP_SEQUENCES = 16

router = APIRouter(tags=["anthropic"])

# What changes the answer and cannot be honoured.
_REFUSED = ("mcp_servers", "container", "context_management")

Blocks = Annotated[list[dict[str, Any]], Field(max_length=MAX_CALLS)]


class Said(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["user", "assistant"]
    content: str | Blocks


class Thinks(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None


class AnthropicTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        if self.type not in (None, "custom") or self.input_schema is None:
            raise RequestError(
                f"the tool '{self.name}' of type {self.type!r} would run on a server; only custom ones work",
                code="unsupported",
                param="tools",
            )
        return Tool(self.name, self.description or "", self.input_schema, strict=bool(self.strict))


class ToolChoice(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Asked(BaseModel):
    """What a conversation is made of, for an answer as for a count."""

    model_config = ConfigDict(strict=True, extra="allow")

    messages: Annotated[list[Said], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    system: str | Blocks | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinks | None = None
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    def conversation(self) -> Conversation:
        for name in _REFUSED:
            if (self.model_extra or {}).get(name):
                raise RequestError(f"{name} is not supported", code="unsupported", param=name)
        choice, parallel = "auto", True
        if self.tool_choice is not None:
            if self.tool_choice.type == "tool" and not self.tool_choice.name:
                raise RequestError("tool_choice of type tool needs a name", param="tool_choice")
            named = self.tool_choice.name or ""
            choice = {"any": "required", "tool": named}.get(self.tool_choice.type, self.tool_choice.type)
            parallel = not self.tool_choice.disable_parallel_tool_use
        switch = budget = None
        if self.thinking is not None and self.thinking.type != "adaptive":
            switch, budget = self.thinking.type == "enabled", self.thinking.budget_tokens
        return Conversation(
            self._flat(),
            tools=[tool.tool() for tool in self.tools or []],
            choice=choice,
            parallel=parallel,
            thinking=switch,
            budget=budget,
            constraint=self._constraint(),
        )

    def _constraint(self) -> Constraint | None:
        wanted = self.output_format or (self.output_config or {}).get("format")
        if wanted is None:
            return None
        if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
            raise RequestError("output_format is known as json_schema only", param="output_format")
        return json_constraint(wanted.get("schema"), "output_format.schema")

    def _flat(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        if self.system:
            text = self.system if isinstance(self.system, str) else _texts(self.system, "system")
            rows.append({"role": "system", "content": text})
        for i, said in enumerate(self.messages):
            rows += _rows(said, f"messages[{i}]")
        return flat([Message(**row) for row in rows])


class Messages(Asked):
    max_tokens: Count
    stream: bool | None = None
    temperature: Floor | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOP_SEQUENCES)] | None = None

    def params(self) -> Params:
        return Params(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or [],
        )


def _rows(said: Said, where: str) -> list[dict[str, Any]]:
    """A message as rows of OpenAI's kind: results of tools become messages of their own, in front."""
    if isinstance(said.content, str):
        return [{"role": said.role, "content": said.content}]
    texts, thoughts, calls, results = [], [], [], []
    for block in said.content:
        kind = block.get("type")
        try:
            if kind == "text":
                texts.append(str(block["text"]))
            elif kind == "thinking":
                thoughts.append(str(block["thinking"]))
            elif kind == "redacted_thinking":
                continue
            elif kind == "tool_use":
                function = {"name": block["name"], "arguments": block["input"]}
                calls.append({"id": block["id"], "type": "function", "function": function})
            elif kind == "tool_result":
                content = block.get("content") or ""
                text = content if isinstance(content, str) else _texts(content, f"{where}.content")
                results.append({"role": "tool", "content": text, "tool_call_id": block["tool_use_id"]})
            else:
                raise RequestError(
                    f"{where}.content has a block of type {kind!r}; this is a text model", param=where
                )
        except KeyError as error:
            raise RequestError(f"{where}.content: a {kind} block lacks {error}", param=where) from error
    rows: list[dict[str, Any]] = results
    if texts or calls or thoughts or not results:
        row: dict[str, Any] = {"role": said.role, "content": "".join(texts)}
        if calls:
            row["tool_calls"] = calls
        if thoughts:
            row["reasoning_content"] = "".join(thoughts)
        rows = [*results, row]
    return rows


def _texts(blocks: Any, where: str) -> str:
    if not isinstance(blocks, list):
        raise RequestError(f"{where} must be a text or a list of blocks", param=where)
    for block in blocks:
        if (
            not isinstance(block, dict)
            or block.get("type") != "text"
            or not isinstance(block.get("text"), str)
        ):
            raise RequestError(f"{where} may hold text blocks only; this is a text model", param=where)
    return "".join(block["text"] for block in blocks)


@router.post(PATH, summary="Anthropic's messages")
async def messages(request: Request, body: Messages) -> Response:
    asked, params = body.conversation(), body.params()
    serving = await serving_for(request, body.model)
    turn = Turn(serving, asked)
    [stream] = turn.start(params)
    head = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": serving.name,
    }
    reader = turn.reader()
    if body.stream:
        return _Events([stream], _events(head, turn, reader, stream), serving.headers())
    return Answer([stream], lambda: _answer(head, reader, stream), serving.headers())


@router.post(f"{PATH}/count_tokens", summary="How many tokens a conversation has")
async def count_tokens(request: Request, body: Asked) -> dict[str, int]:
    serving = await serving_for(request, body.model)
    return {"input_tokens": await _count(serving, Turn(serving, body.conversation()).prompt)}


async def _count(serving: Serving, prompt: str) -> int:
    return len((await serving.engine.encode(prompt, special=True, whole=True)).ids)


def _usage(done: msg.Done) -> dict[str, int]:
    return {
        "input_tokens": done.prompt_tokens - done.cached_tokens,
        "cache_read_input_tokens": done.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": done.completion_tokens,
    }


def _stop(done: msg.Done, *, called: bool) -> dict[str, str | None]:
    reason = finish_reason(done)
    if reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if called:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if done.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": done.stop}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _tool_use(call: Call) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": call.id.replace("call_", "toolu_"),
        "name": call.name,
        "input": msgspec.json.decode(call.arguments),
    }


async def _answer(head: dict[str, Any], reader: Reader | None, stream: Stream) -> dict[str, Any]:
    whole = await collect(stream, reader)
    blocks: list[dict[str, Any]] = []
    if whole.thought:
        blocks.append({"type": "thinking", "thinking": whole.thought, "signature": ""})
    if whole.text:
        blocks.append({"type": "text", "text": whole.text})
    blocks += [_tool_use(call) for call in whole.calls]
    done = whole.done
    stop = _stop(done, called=bool(whole.calls))
    return {**head, "content": blocks, **stop, "usage": _usage(done)}


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode("ascii") + b"\ndata: " + dump({"type": kind, **fields}) + b"\n\n"


class _Events(EventStream):
    def _failed(self, error: RequestError) -> bytes:
        return _event("error", error=error_body.body(PATH, error)["error"])


async def _events(
    head: dict[str, Any], turn: Turn, reader: Reader | None, stream: Stream
) -> AsyncIterator[bytes]:
    blocks = _Blocks()
    opening = b""
    begun = False
    async for item in stream:
        if not begun:
            # The prompt's length is known to the engine alone, and it has it by now.
            count = await _count(turn.serving, turn.prompt)
            usage = {"input_tokens": count, "output_tokens": 0}
            start = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
            opening = _event("message_start", message=start)
            begun = True
        last = isinstance(item, msg.Done)
        thought, text, calls = reader.push(item.text, last=last) if reader else ("", item.text, [])
        chunk, opening = opening, b""
        if thought:
            chunk += blocks.add("thinking", thought)
        if text:
            chunk += blocks.add("text", text)
        for call in calls:
            chunk += blocks.call(call)
        if isinstance(item, msg.Done):
            stop = _stop(item, called=blocks.called)
            chunk += blocks.close()
            chunk += _event("message_delta", delta=stop, usage=_usage(item))
            chunk += _event("message_stop")
        if chunk:
            yield chunk


class _Blocks:
    """The content blocks of a stream, opened and closed in order."""

    def __init__(self) -> None:
        self._index = -1
        self._open = ""
        self.called = False

    def add(self, kind: Literal["thinking", "text"], text: str) -> bytes:
        chunk = b""
        if self._open != kind:
            empty = {"type": "text", "text": ""}
            if kind == "thinking":
                empty = {"type": "thinking", "thinking": "", "signature": ""}
            chunk = self._start(kind, empty)
        return chunk + self._delta({"type": f"{kind}_delta", kind: text})

    def call(self, call: Call) -> bytes:
        self.called = True
        chunk = self._start("tool_use", {**_tool_use(call), "input": {}})
        return (
            chunk + self._delta({"type": "input_json_delta", "partial_json": call.arguments}) + self.close()
        )

    def close(self) -> bytes:
        if not self._open:
            return b""
        chunk = b""
        if self._open == "thinking":
            chunk = self._delta({"type": "signature_delta", "signature": ""})
        self._open = ""
        return chunk + _event("content_block_stop", index=self._index)

    def _start(self, kind: str, block: dict[str, Any]) -> bytes:
        chunk = self.close()
        self._index += 1
        self._open = kind
        return chunk + _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)
