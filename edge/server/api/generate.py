"""The tutorial's interface: GET /generate?prompt=... -> {"generate_text": ...}, and a POST with every option.

Prompts go through the model's chat template unless `raw` is asked. Without a temperature decoding is greedy,
as transformers' `generate` is by default. Without max_tokens an answer has at most 512 tokens, the tutorial's
number.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.errors import RequestError
from edge.server.conversation import AnswerReader, Conversation, collect, prepared
from edge.server.model_registry import served_model
from edge.server.openai_objects import usage
from edge.server.request_fields import MAX_TOKENS, Closed, Constrained, Messages, Sampled, Thinking, flat
from edge.server.served_model import ServedModel, finish_reason, timings
from edge.server.streaming import DONE, SSE, event, respond

DEFAULT_MAX_TOKENS = 512

router = APIRouter(tags=["generate"])


class Generate(Sampled, Constrained, Thinking, Closed):
    """prompt: a text; or messages: a conversation. raw: the prompt is not put through the chat template."""

    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Messages | None = None
    raw: bool = False
    model: str | None = None


@router.get("/generate", summary="Answer a prompt, as the tutorial's server does", responses=SSE)
async def get_generate(
    request: Request,
    prompt: Annotated[str, Query(min_length=1)],
    max_tokens: Annotated[int, Query(ge=1, le=MAX_TOKENS)] = DEFAULT_MAX_TOKENS,
    temperature: Annotated[float, Query(ge=0.0, le=2.0, allow_inf_nan=False)] = 0.0,
    raw: bool = False,
    stream: bool = False,
) -> Response:
    body = Generate(prompt=prompt, max_tokens=max_tokens, temperature=temperature, raw=raw, stream=stream)
    return await post_generate(request, body)


@router.post("/generate", summary="Answer a prompt or a conversation", responses=SSE)
async def post_generate(request: Request, body: Generate) -> Response:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    constraint = body.constraint()
    params = body.params(temperature=0.0, max_tokens=DEFAULT_MAX_TOKENS)
    if body.raw:
        if body.prompt is None:
            raise RequestError("raw needs prompt, not messages", param="raw")
        model = await served_model(request, body.model)
        stream = model.engine.submit(body.prompt, params, constraint=constraint, **body.run())
    else:
        messages = flat(body.messages) if body.messages else [{"role": "user", "content": body.prompt}]
        # The reasoning stays in the text: this interface has no other field for it.
        asked = Conversation(messages, constraint=constraint, **{**body.thinking(), "raw": True})
        model = await served_model(request, body.model)
        [stream] = (await prepared(model, asked)).start(params, **body.run())
    return respond(
        [stream],
        model.headers(body.ignored),
        answer=lambda: _answer(model, stream),
        events=_events(model, stream) if body.stream else None,
    )


async def _answer(model: ServedModel, stream: Stream) -> dict[str, Any]:
    answer = await collect(stream, AnswerReader())
    return {"generate_text": answer.text, **_closing(model, answer.done)}


async def _events(model: ServedModel, stream: Stream) -> AsyncIterator[bytes]:
    async for item in stream:
        if item.text:
            yield event({"text": item.text, "tokens": item.tokens})
        if isinstance(item, msg.Done):
            yield event({"done": True, **_closing(model, item)}) + DONE


def _closing(model: ServedModel, done: msg.Done) -> dict[str, Any]:
    return {
        "finish_reason": finish_reason(done),
        "usage": usage([done]),
        "timings": timings(done),
        "model": model.name,
        "digest": model.digest or None,
    }
