"""OpenAI's older completions: a prompt as text or token ids, or a list of either; no chat template."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import EngineProcess, Stream
from edge.errors import RequestError
from edge.server.conversation import AnswerReader, Item, collect_all
from edge.server.model_registry import served_model
from edge.server.openai_objects import (
    MAX_PROMPTS,
    CompletionFields,
    IdPrompts,
    Ids,
    ResponseObjects,
    prompt_list,
    text_logprobs,
    usage,
)
from edge.server.request_fields import TopLogprobs
from edge.server.served_model import finish_reason
from edge.server.streaming import SSE, respond, start_streams

DEFAULT_COMPLETION_TOKENS = 512

router = APIRouter(prefix="/v1", tags=["openai"])

Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]


class Completion(CompletionFields):
    """echo: the prompt stands before its answer. best_of is taken where it equals n: all are returned."""

    prompt: str | Ids | Prompts | IdPrompts
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    best_of: int | None = None

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
        count = len(prompt_list(self.prompt)) * (self.n or 1)
        if count > MAX_PROMPTS:
            raise RequestError(f"{count} answers in one request; the most is {MAX_PROMPTS}", param="n")


@router.post("/completions", responses=SSE)
async def completions(request: Request, body: Completion) -> Response:
    body.check()
    params = body.params(temperature=1.0, max_tokens=DEFAULT_COMPLETION_TOKENS, logprobs=body.logprobs)
    run = {"constraint": body.constraint(), **body.run()}
    model = await served_model(request, body.model)
    n, prompts = body.n or 1, prompt_list(body.prompt)
    echoes = [await _text(model.engine, prompt) if body.echo else "" for prompt in prompts for _ in range(n)]
    streams = start_streams(
        model.engine.submit(prompt, params.with_seed(i), **run) for prompt in prompts for i in range(n)
    )
    objects = ResponseObjects(model, "text_completion", "cmpl")
    take = _Chunks(objects, echoes).take
    events = objects.events(streams, take, choices=n, include_usage=body.include_usage)
    return respond(
        streams,
        model.headers(body.ignored),
        answer=lambda: _answer(objects, streams, echoes, n),
        events=events if body.stream else None,
    )


async def _text(engine: EngineProcess, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return b"".join((await engine.decode(prompt)).pieces).decode("utf-8", "replace")


async def _answer(
    objects: ResponseObjects, streams: list[Stream], echoes: list[str], n: int
) -> dict[str, Any]:
    answers = await collect_all(streams, AnswerReader)
    choices = [
        {
            "index": index,
            "text": echo + answer.text,
            "logprobs": text_logprobs(answer.logprobs, 0),
            "finish_reason": finish_reason(answer.done),
        }
        for index, (answer, echo) in enumerate(zip(answers, echoes, strict=True))
    ]
    return objects.whole(choices, usage([answer.done for answer in answers], n))


class _Chunks:
    """The engine's items as chunks; each prompt that is echoed comes before the first."""

    def __init__(self, objects: ResponseObjects, echoes: list[str]) -> None:
        self._objects = objects
        self._opening = b"".join(objects.text(i, "text", echo) for i, echo in enumerate(echoes) if echo)
        self._lengths = [0] * len(echoes)

    def take(self, index: int, item: Item) -> bytes:
        chunk, self._opening = self._opening, b""
        if item.logprobs is not None:
            chunk += self._chunk(index, item.text, text_logprobs(item.logprobs, self._lengths[index]), None)
        elif item.text:
            chunk += self._objects.text(index, "text", item.text)
        self._lengths[index] += len(item.text)
        if isinstance(item, msg.Done):
            chunk += self._chunk(index, "", None, finish_reason(item))
        return chunk

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> bytes:
        return self._objects.chunk(
            {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        )
