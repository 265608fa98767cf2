"""The tutorial's own interface: GET /generate?prompt=... -> {"generate_text": ...}; POST for all else.

Prompts go through the model's chat template unless `raw` is asked. Without a temperature decoding is
greedy, as transformers' `generate` is by default; without max_tokens an answer has at most 512 tokens, the
tutorial's number.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from edge.engine import protocol as msg
from edge.engine.client import Stream
from edge.engine.grammar import Constraint, json_constraint
from edge.errors import RequestError
from edge.server.conversation import Conversation, Turn
from edge.server.model_registry import serving_for
from edge.server.openai_objects import usage
from edge.server.request_fields import MAX_TOKENS, Messages, Sampled, Thinking, flat
from edge.server.served_model import Serving, finish_reason, timings
from edge.server.streaming import DONE, Answer, EventStream, event

DEFAULT_MAX_TOKENS = 512

router = APIRouter(tags=["generate"])


class Generate(Sampled, Thinking):
    """prompt: a text; or messages: a conversation. raw: the prompt is not put through the chat template.

    json_schema (a schema, or true for any object), regex or grammar (Lark): what the answer must match.
    """

    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Messages | None = None
    raw: bool = False
    model: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    regex: str | None = None
    grammar: str | None = None

    def constraint(self) -> Constraint | None:
        """What the answer must match. Raises RequestError for more than one."""
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RequestError(f"give one of {' and '.join(given)}", param=given[1])
        if not given:
            return None
        if self.json_schema is not None:
            return json_constraint(self.json_schema, "json_schema")
        if self.regex is not None:
            return Constraint("regex", self.regex, "regex")
        return Constraint("lark", self.grammar or "", "grammar")


@router.get("/generate", summary="Answer a prompt, as the tutorial's server does")
async def get_generate(
    request: Request,
    prompt: Annotated[str, Query(min_length=1)],
    max_tokens: Annotated[int, Query(ge=1, le=MAX_TOKENS)] = DEFAULT_MAX_TOKENS,
    temperature: Annotated[float, Query(ge=0.0, le=2.0, allow_inf_nan=False)] = 0.0,
    raw: bool = False,
    stream: bool = False,
) -> Response:
    body = Generate(prompt=prompt, max_tokens=max_tokens, temperature=temperature, raw=raw, stream=stream)
    return await _respond(request, body)


@router.post("/generate", summary="Answer a prompt or a conversation")
async def post_generate(request: Request, body: Generate) -> Response:
    return await _respond(request, body)


async def _respond(request: Request, body: Generate) -> Response:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    constraint = body.constraint()
    params = body.params(temperature=0.0, max_tokens=DEFAULT_MAX_TOKENS)
    if body.raw:
        if body.prompt is None:
            raise RequestError("raw needs prompt, not messages", param="raw")
        serving = await serving_for(request, body.model)
        stream = serving.engine.submit(body.prompt, params, constraint=constraint, **body.run())
    else:
        turns = flat(body.messages) if body.messages else [{"role": "user", "content": body.prompt}]
        # The thought stays in the text: there is no other field that this interface could put it into.
        asked = Conversation(turns, constraint=constraint, **{**body.thinking(), "raw": True})
        serving = await serving_for(request, body.model)
        [stream] = Turn(serving, asked).start(params, **body.run())
    if body.stream:
        return EventStream([stream], _events(serving, stream), serving.headers())
    return Answer([stream], lambda: _answer(serving, stream), serving.headers())


async def _answer(serving: Serving, stream: Stream) -> dict[str, Any]:
    parts = []
    async for item in stream:
        parts.append(item.text)
    assert isinstance(item, msg.Done)
    return {"generate_text": "".join(parts), **_closing(serving, item)}


async def _events(serving: Serving, stream: Stream) -> AsyncIterator[bytes]:
    async for item in stream:
        if item.text:
            yield event({"text": item.text, "tokens": item.tokens})
        if isinstance(item, msg.Done):
            yield event({"done": True, **_closing(serving, item)}) + DONE


def _closing(serving: Serving, done: msg.Done) -> dict[str, Any]:
    return {
        "finish_reason": finish_reason(done),
        "usage": usage([done]),
        "timings": timings(done),
        "model": serving.name,
        "digest": serving.digest or None,
    }
