"""Texts to token ids and back, by the loaded model's own tokenizer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from edge.errors import RequestError
from edge.server.conversation import Conversation, Turn
from edge.server.model_registry import serving_for
from edge.server.request_fields import MAX_TOKENS, Messages, flat

router = APIRouter(tags=["tokens"])


class Tokenize(BaseModel):
    """text, or messages (put through the chat template). special: control tokens in a text are parsed."""

    model_config = ConfigDict(strict=True, extra="forbid")

    text: str | None = None
    messages: Messages | None = None
    special: bool = True
    model: str | None = None


class Detokenize(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKENS)]
    model: str | None = None


@router.post("/tokenize", summary="The token ids of a text or a conversation")
async def tokenize(request: Request, body: Tokenize) -> dict[str, Any]:
    """pieces: what each id stands for; a part of a character is shown as U+FFFD."""
    if (body.text is None) == (body.messages is None):
        raise RequestError("give either text or messages", param="text")
    serving = await serving_for(request, body.model)
    if body.messages is not None:
        prompt = Turn(serving, Conversation(flat(body.messages))).prompt
        found = await serving.engine.encode(prompt, special=True, whole=True)
    else:
        found = await serving.engine.encode(body.text or "", special=body.special)
    return {
        "tokens": found.ids,
        "count": len(found.ids),
        "pieces": [piece.decode("utf-8", "replace") for piece in found.pieces],
        "model": serving.name,
    }


@router.post("/detokenize", summary="The text of token ids")
async def detokenize(request: Request, body: Detokenize) -> dict[str, Any]:
    serving = await serving_for(request, body.model)
    found = await serving.engine.decode(body.tokens)
    text = b"".join(found.pieces).decode("utf-8", "replace")
    return {"text": text, "count": len(found.ids), "model": serving.name}
