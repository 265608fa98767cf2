"""Texts to token ids and back, by the loaded model's own tokenizer."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from edge.engine.protocol import Encoded
from edge.errors import RequestError
from edge.server.conversation import Conversation, prepared
from edge.server.model_registry import served_model
from edge.server.request_fields import MAX_TOKENS, Closed, Messages, TokenId, flat

router = APIRouter(tags=["tokens"])


class Tokenize(Closed):
    """text, or messages (put through the chat template). special: control tokens in a text are parsed."""

    text: str | None = None
    messages: Messages | None = None
    special: bool = True
    model: str | None = None


class Detokenize(Closed):
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]
    model: str | None = None


@router.post("/tokenize", summary="The token ids of a text or a conversation")
async def tokenize(request: Request, body: Tokenize) -> Response:
    """pieces: the text of each id; a part of a character is shown as U+FFFD."""
    if (body.text is None) == (body.messages is None):
        raise RequestError("give either text or messages", param="text")
    model = await served_model(request, body.model)
    if body.messages is not None:
        prompt = (await prepared(model, Conversation(flat(body.messages)))).prompt
        encoded = await model.encode(prompt, special=True, whole=True)
    else:
        encoded = await model.encode(body.text or "", special=body.special)
    # There may be a million of them: streams go on meanwhile.
    return Response(await asyncio.to_thread(_written, encoded, model.name), media_type="application/json")


def _written(encoded: Encoded, model: str) -> bytes:
    pieces = [piece.decode("utf-8", "replace") for piece in encoded.pieces]
    answer = {"tokens": encoded.ids, "count": len(encoded.ids), "pieces": pieces, "model": model}
    return msgspec.json.encode(answer)


@router.post("/detokenize", summary="The text of token ids")
async def detokenize(request: Request, body: Detokenize) -> dict[str, Any]:
    model = await served_model(request, body.model)
    decoded = await model.engine.decode(body.tokens)
    text = b"".join(decoded.pieces).decode("utf-8", "replace")
    return {"text": text, "count": len(decoded.ids), "model": model.name}
