"""OpenAI's older completions: a prompt as text or token ids, or a list of either; no chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.errors import RequestError
from edge.server.api.openai_chat import MAX_CHOICES, OpenAI
from edge.server.conversation import collect, merged
from edge.server.model_registry import serving_for
from edge.server.openai_objects import Shape, summed, text_logprobs, usage
from edge.server.served_model import finish_reason
from edge.server.streaming import DONE, Answer, EventStream

DEFAULT_COMPLETION_TOKENS = 512
MAX_PROMPTS = 64

router = APIRouter(prefix="/v1", tags=["openai"])

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
IdPrompts = Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]


class Completion(OpenAI):
    """echo: the prompt stands before its answer. best_of is taken where it equals n: all are returned."""

    prompt: str | Ids | Prompts | IdPrompts
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt."""
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError(
                "best_of other than n is not supported", code="unsupported", param="best_of", hint="use n"
            )
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo with logprobs is not supported: prompts have none", code="unsupported", param="echo"
            )
        count = len(self.prompts()) * (self.n or 1)
        if count > MAX_PROMPTS:
            raise RequestError(f"{count} answers in one request; at most {MAX_PROMPTS} are made", param="n")


assert MAX_CHOICES <= MAX_PROMPTS


@router.post("/completions")
async def completions(request: Request, body: Completion) -> Response:
    body.check()
    params = body.params(temperature=1.0, max_tokens=DEFAULT_COMPLETION_TOKENS, logprobs=body.logprobs)
    constraint = body.constraint()
    serving = await serving_for(request, body.model)
    n, prompts = body.n or 1, body.prompts()
    echoes = [await _text(serving.engine, prompt) for prompt in prompts] if body.echo else [""] * len(prompts)
    streams = []
    for prompt in prompts:
        for i in range(n):
            one = params.with_seed(i)
            streams.append(serving.engine.submit(prompt, one, constraint=constraint, **body.run()))
    echoes = [echo for echo in echoes for _ in range(n)]
    shape = Shape(serving, "text_completion", "cmpl")
    if body.stream:
        events = _events(shape, streams, echoes, n, body.include_usage)
        return EventStream(streams, events, serving.headers())
    return Answer(streams, lambda: _answer(shape, streams, echoes, n), serving.headers())


async def _text(engine: Any, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    pieces: list[bytes] = (await engine.decode(prompt)).pieces
    return b"".join(pieces).decode("utf-8", "replace")


async def _answer(shape: Shape, streams: list[Stream], echoes: list[str], n: int) -> dict[str, Any]:
    choices, dones = [], []
    for index, (stream, echo) in enumerate(zip(streams, echoes, strict=True)):
        whole = await collect(stream, None)
        choices.append(
            {
                "index": index,
                "text": echo + whole.text,
                "logprobs": text_logprobs(whole.logprobs, 0),
                "finish_reason": finish_reason(whole.done),
            }
        )
        dones.append(whole.done)
    return shape.whole(choices, _usage(dones, n))


def _usage(dones: list[msg.Done], n: int) -> dict[str, Any]:
    return summed([usage(dones[at : at + n]) for at in range(0, len(dones), n)])


async def _events(
    shape: Shape, streams: list[Stream], echoes: list[str], n: int, include_usage: bool
) -> AsyncIterator[bytes]:
    shown = [0] * len(streams)
    dones: dict[int, msg.Done] = {}
    items = merged(streams) if len(streams) > 1 else _numbered(streams[0])
    opening = b"".join(shape.text(i, "text", echo) for i, echo in enumerate(echoes) if echo)
    async for i, item in items:
        chunk, opening = opening, b""
        if item.logprobs is not None:
            logprobs = text_logprobs(item.logprobs, shown[i])
            chunk += shape.chunk({"index": i, "text": item.text, "logprobs": logprobs, "finish_reason": None})
        elif item.text:
            chunk += shape.text(i, "text", item.text)
        shown[i] += len(item.text)
        if isinstance(item, msg.Done):
            dones[i] = item
            end = {"index": i, "text": "", "logprobs": None, "finish_reason": finish_reason(item)}
            chunk += shape.chunk(end)
            if len(dones) == len(streams):
                last = _usage([dones[k] for k in sorted(dones)], n)
                chunk += (shape.chunk(None, last) if include_usage else b"") + DONE
        if chunk:
            yield chunk


async def _numbered(stream: Stream) -> AsyncIterator[tuple[int, msg.Delta | msg.Done]]:
    async for item in stream:
        yield 0, item
