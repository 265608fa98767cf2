"""OpenAI's chat completions, and the list of models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.errors import RequestError
from edge.server.conversation import AnswerReader, Conversation, Item, PreparedChat, collect_all, prepared
from edge.server.model_registry import ModelEntry, registry_of, served_model
from edge.server.openai_objects import CompletionFields, ResponseObjects, chat_logprobs, usage
from edge.server.request_fields import Count, FunctionTools, Messages, Part, Thinking, TopLogprobs, flat
from edge.server.served_model import finish_reason
from edge.server.streaming import SSE, respond
from edge.server.tool_dialects import MAX_TOOLS, Call, chosen

router = APIRouter(prefix="/v1", tags=["openai"])


class NamedFunction(BaseModel):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Part):
    """A choice among some of the tools."""

    class Choice(Part):
        mode: Literal["auto", "required"]
        tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]

    type: Literal["allowed_tools"]
    allowed_tools: Choice


class ChatCompletion(CompletionFields, Thinking):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: FunctionTools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs goes with logprobs: true", param="top_logprobs")

    def conversation(self) -> Conversation:
        choice, tools = self.tool_choice or "auto", [tool.function.tool() for tool in self.tools or []]
        if isinstance(choice, AllowedTools):
            tools = chosen(tools, [tool.function.name for tool in choice.allowed_tools.tools])
            choice = choice.allowed_tools.mode
        return Conversation(
            flat(self.messages),
            tools=tools,
            choice=choice if isinstance(choice, str) else choice.function.name,
            parallel=self.parallel_tool_calls is not False,
            constraint=self.constraint(),
            **self.thinking(),
        )


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(entry) for entry in registry_of(request).exported()]}


@router.get("/models/{name}")
async def one_model(request: Request, name: str) -> dict[str, Any]:
    return _model(registry_of(request).entry(name))


def _model(entry: ModelEntry) -> dict[str, Any]:
    return {
        "id": entry.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "edge",
        "digest": entry.digest or None,
        "loaded": entry.served is not None,
    }


@router.post("/chat/completions", responses=SSE)
async def chat_completions(request: Request, body: ChatCompletion) -> Response:
    body.check()
    asked = body.conversation()
    params = body.params(
        temperature=1.0,
        max_tokens=body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    model = await served_model(request, body.model)
    chat = await prepared(model, asked)
    n = body.n or 1
    streams = chat.start(params, n, **body.run())
    objects = ResponseObjects(model, "chat.completion", "chatcmpl")
    choices = [_Choice(objects, chat.reader(), i) for i in range(n)]
    events = objects.events(
        streams, lambda i, item: choices[i].take(item), choices=n, include_usage=body.include_usage
    )
    return respond(
        streams,
        model.headers(body.ignored),
        answer=lambda: _answer(objects, chat, streams),
        events=events if body.stream else None,
    )


async def _answer(objects: ResponseObjects, chat: PreparedChat, streams: list[Stream]) -> dict[str, Any]:
    choices, dones = [], []
    for index, answer in enumerate(await collect_all(streams, chat.reader)):
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if chat.splits:
            message["reasoning_content"] = answer.reasoning or None
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [_tool_call(call) for call in answer.calls]
        reason = _finish_reason(answer.done, called=bool(answer.calls))
        logprobs = chat_logprobs(answer.logprobs)
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        dones.append(answer.done)
    return objects.whole(choices, usage(dones, len(dones)))


class _Choice:
    """One choice of a stream: the engine's items as chunks."""

    def __init__(self, objects: ResponseObjects, reader: AnswerReader, index: int) -> None:
        self._objects = objects
        self._reader = reader
        self._index = index
        self._calls = 0
        self._opened = False

    def take(self, item: Item) -> bytes:
        reasoning, text, calls = self._reader.take(item)
        last = isinstance(item, msg.Done)
        if self._opened and not calls and not last and item.logprobs is None:
            chunk = self._objects.text(self._index, "reasoning_content", reasoning) if reasoning else b""
            return chunk + (self._objects.text(self._index, "content", text) if text else b"")
        delta: dict[str, Any] = {} if self._opened else {"role": "assistant", "content": ""}
        self._opened = True
        if reasoning:
            delta["reasoning_content"] = reasoning
        if text:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = [
                {"index": i, **_tool_call(call)} for i, call in enumerate(calls, self._calls)
            ]
            self._calls += len(calls)
        chunk = self._chunk(delta, None, item.logprobs) if delta or item.logprobs else b""
        if isinstance(item, msg.Done):
            chunk += self._chunk({}, _finish_reason(item, called=self._calls > 0), None)
        return chunk

    def _chunk(self, delta: dict[str, Any], reason: str | None, logprobs: list[msg.Logprob] | None) -> bytes:
        choice = {"index": self._index, "delta": delta, "logprobs": chat_logprobs(logprobs)}
        return self._objects.chunk({**choice, "finish_reason": reason})


def _tool_call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _finish_reason(done: msg.Done, *, called: bool) -> str:
    reason = finish_reason(done)
    return "tool_calls" if called and reason == "stop" else reason
