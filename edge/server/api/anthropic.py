"""Anthropic's messages, streamed in its order of events, and the count of a conversation's tokens."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import AfterValidator, Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.errors import RequestError
from edge.server.conversation import AnswerReader, Conversation, PreparedChat, collect, prepared
from edge.server.model_registry import served_model
from edge.server.request_fields import (
    MAX_CALLS,
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOKENS,
    Body,
    Count,
    Floor,
    Name,
    Part,
    Share,
    Stop,
    TopK,
    answer_format,
    flat_row,
    sampling,
    text_of,
)
from edge.server.served_model import finish_reason
from edge.server.streaming import SSE, named_event, respond
from edge.server.tool_dialects import MAX_TOOLS, Call, Tool

router = APIRouter(prefix="/v1/messages", tags=["anthropic"])

_ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    408: "timeout_error",
}  # fmt: skip

_BLOCK_TEXTS = ("type", "text", "thinking", "id", "name", "tool_use_id")


def _checked(block: dict[str, Any]) -> dict[str, Any]:
    for key in _BLOCK_TEXTS:
        if not isinstance(block.get(key, ""), str):
            raise ValueError(f"{key} must be a text")
    return block


Block = Annotated[dict[str, Any], AfterValidator(_checked)]
Blocks = Annotated[list[Block], Field(max_length=MAX_CALLS)]


def error_body(error: RequestError) -> dict[str, Any]:
    """Anthropic's error object."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


class AnthropicMessage(Part):
    role: Literal["user", "assistant"]
    content: str | Blocks


class ThinkingMode(Part):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None


class AnthropicTool(Part):
    name: Name
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


class ToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ContextEdit(Part):
    type: str
    keep: Any = None


class ContextManagement(Part):
    edits: Annotated[list[ContextEdit], Field(max_length=MAX_CALLS)] | None = None


# The blocks that an edit of this type, without its date, takes out of a conversation.
_EDITED = {"clear_thinking": "thinking", "clear_tool_uses": "tool_result"}


class ConversationFields(Body):
    """What a conversation is made of, for an answer as for a count."""

    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    system: str | Blocks | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingMode | None = None
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    context_management: ContextManagement | None = None

    def conversation(self) -> Conversation:
        self._check_edits()
        wanted = self.tool_choice or ToolChoice(type="auto")
        if wanted.type == "tool" and not wanted.name:
            raise RequestError("tool_choice of type tool needs a name", param="tool_choice")
        choices = {"any": "required", "tool": wanted.name or ""}
        switch = budget = None
        if self.thinking is not None and self.thinking.type != "adaptive":
            switch, budget = self.thinking.type == "enabled", self.thinking.budget_tokens
        output = self.output_format or (self.output_config or {}).get("format")
        return Conversation(
            self._messages(),
            tools=[tool.tool() for tool in self.tools or []],
            choice=choices.get(wanted.type, wanted.type),
            parallel=not wanted.disable_parallel_tool_use,
            thinking=switch,
            budget=budget,
            constraint=answer_format(output, "output_format", "output_format.schema"),
        )

    def _check_edits(self) -> None:
        """Raise RequestError for a context edit that would change this conversation."""
        contents = [message.content for message in self.messages if not isinstance(message.content, str)]
        kinds = {block.get("type") for blocks in contents for block in blocks}
        for edit in (self.context_management and self.context_management.edits) or []:
            edited = _EDITED.get(edit.type.rpartition("_")[0])
            if edited is None or (edited in kinds and not (edited == "thinking" and edit.keep == "all")):
                raise RequestError(
                    f"context_management of type '{edit.type[:64]}' would change this conversation",
                    code="unsupported",
                    param="context_management",
                )

    def _messages(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        if self.system:
            rows.append({"role": "system", "content": text_of(self.system, "system")})
        for i, message in enumerate(self.messages):
            rows += [flat_row(row, f"messages[{i}]") for row in _rows(message, f"messages[{i}]")]
        return rows


class Messages(ConversationFields):
    max_tokens: Count
    stream: bool | None = None
    temperature: Floor | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None


class Counted(Messages):
    """The same body without its answer; what only an answer has changes no count."""

    max_tokens: Count | None = None  # type: ignore[assignment]


def _rows(message: AnthropicMessage, where: str) -> list[dict[str, Any]]:
    """A message in the form of chat completions. Results of tools become messages of their own, in front."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts, thoughts, calls, results = [], [], [], []
    for block in message.content:
        kind = block.get("type")
        try:
            if kind == "text":
                texts.append(block["text"])
            elif kind == "thinking":
                thoughts.append(block["thinking"])
            elif kind == "tool_use":
                function = {"name": block["name"], "arguments": block["input"]}
                calls.append({"id": block["id"], "type": "function", "function": function})
            elif kind == "tool_result":
                text = text_of(block.get("content") or "", f"{where}.content")
                results.append({"role": "tool", "content": text, "tool_call_id": block["tool_use_id"]})
            elif kind != "redacted_thinking":
                raise RequestError(
                    f"{where}.content has a block of type {kind!r}; this is a text model", param=where
                )
        except KeyError as error:
            raise RequestError(f"{where}.content: a {kind} block lacks {error}", param=where) from error
    if results and not (texts or calls or thoughts):
        return results
    row: dict[str, Any] = {"role": message.role, "content": "".join(texts)}
    if calls:
        row["tool_calls"] = calls
    if thoughts:
        row["reasoning_content"] = "".join(thoughts)
    return [*results, row]


@router.post("", summary="Anthropic's messages", responses=SSE)
async def messages(request: Request, body: Messages) -> Response:
    asked, params = body.conversation(), sampling(body, stop=body.stop_sequences or [])
    model = await served_model(request, body.model)
    chat = await prepared(model, asked)
    [stream] = chat.start(params)
    head = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": model.name,
    }
    return respond(
        [stream],
        model.headers(body.ignored),
        answer=lambda: _answer(head, chat.reader(), stream),
        events=_events(head, chat, stream) if body.stream else None,
        failure=failure,
    )


def failure(error: RequestError) -> bytes:
    """The last event of a stream that failed after it had begun."""
    return named_event(error_body(error))


@router.post("/count_tokens", summary="How many tokens a conversation has")
async def count_tokens(request: Request, body: Counted) -> dict[str, int]:
    model = await served_model(request, body.model)
    prompt = (await prepared(model, body.conversation())).prompt
    return {"input_tokens": len((await model.encode(prompt, special=True, whole=True)).ids)}


def _usage(done: msg.Done) -> dict[str, int]:
    return {
        "input_tokens": done.prompt_tokens - done.cached_tokens,
        "cache_read_input_tokens": done.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": done.completion_tokens,
    }


def _stop(done: msg.Done, *, called: bool) -> dict[str, str | None]:
    if finish_reason(done) == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if called:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    return {"stop_reason": "end_turn" if done.stop is None else "stop_sequence", "stop_sequence": done.stop}


def _tool_use(call: Call) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": call.id.replace("call_", "toolu_"),
        "name": call.name,
        "input": msgspec.json.decode(call.arguments),
    }


async def _answer(head: dict[str, Any], reader: AnswerReader, stream: Stream) -> dict[str, Any]:
    answer = await collect(stream, reader)
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.text:
        blocks.append({"type": "text", "text": answer.text})
    blocks += [_tool_use(call) for call in answer.calls]
    stop = _stop(answer.done, called=bool(answer.calls))
    return {**head, "content": blocks, **stop, "usage": _usage(answer.done)}


def _event(kind: str, **fields: Any) -> bytes:
    return named_event({"type": kind, **fields})


async def _events(head: dict[str, Any], chat: PreparedChat, stream: Stream) -> AsyncIterator[bytes]:
    reader, blocks = chat.reader(), _Blocks()
    begun = False
    async for item in stream:
        chunk = b""
        if not begun:
            begun = True
            # Only the engine knows the prompt's length, and it has read the prompt by now.
            prompt = await chat.model.engine.encode(chat.prompt, special=True, whole=True)
            usage = {"input_tokens": len(prompt.ids), "output_tokens": 0}
            start = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
            chunk = _event("message_start", message=start)
        reasoning, text, calls = reader.take(item)
        if reasoning:
            chunk += blocks.add("thinking", reasoning)
        if text:
            chunk += blocks.add("text", text)
        for call in calls:
            chunk += blocks.call(call)
        if isinstance(item, msg.Done):
            chunk += blocks.close()
            chunk += _event("message_delta", delta=_stop(item, called=blocks.called), usage=_usage(item))
            chunk += _event("message_stop")
        if chunk:
            yield chunk


_EMPTY_BLOCKS = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}}


class _Blocks:
    """The content blocks of a stream, opened and closed in order. called: whether one was a tool call."""

    def __init__(self) -> None:
        self._index = -1
        self._open = ""
        self.called = False

    def add(self, kind: Literal["thinking", "text"], text: str) -> bytes:
        """The events for more text of this kind."""
        chunk = b"" if self._open == kind else self._start({"type": kind, **_EMPTY_BLOCKS[kind]})
        return chunk + self._delta({"type": f"{kind}_delta", kind: text})

    def call(self, call: Call) -> bytes:
        """The events of a whole tool call."""
        self.called = True
        chunk = self._start({**_tool_use(call), "input": {}})
        chunk += self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        return chunk + self.close()

    def close(self) -> bytes:
        """The events that end the open block."""
        if not self._open:
            return b""
        signature = {"type": "signature_delta", "signature": ""}
        chunk = self._delta(signature) if self._open == "thinking" else b""
        self._open = ""
        return chunk + _event("content_block_stop", index=self._index)

    def _start(self, block: dict[str, Any]) -> bytes:
        chunk = self.close()
        self._index += 1
        self._open = block["type"]
        return chunk + _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)
