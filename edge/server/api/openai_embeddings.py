"""Vectors of texts in OpenAI's form: the mean of the model's last hidden states, of length 1.

A model that was trained to write gives usable vectors, not those of one trained for search; /info names the
length. Texts are embedded between the steps of running answers, one by one.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from edge.engine import protocol as msg
from edge.errors import RequestError
from edge.server.api.openai_completions import IdPrompts, Ids
from edge.server.model_registry import serving_for
from edge.server.served_model import Serving
from edge.server.streaming import GONE

MAX_INPUTS = 2048

router = APIRouter(prefix="/v1", tags=["openai"])


class Embeddings(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    input: str | Ids | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)] | IdPrompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    def inputs(self) -> list[str | list[int]]:
        given = self.input
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)


@router.post("/embeddings", summary="Vectors of texts")
async def embeddings(request: Request, body: Embeddings) -> dict[str, Any]:
    serving = await serving_for(request, body.model)
    width = serving.ready.embedding
    if body.dimensions is not None and body.dimensions != width:
        raise RequestError(
            f"this model's vectors have {width} dimensions and cannot be shortened", param="dimensions"
        )
    found = await embed_all(request, serving, body.inputs())
    plain = body.encoding_format != "base64"
    rows = [
        {
            "object": "embedding",
            "index": i,
            "embedding": floats(one) if plain else base64.b64encode(one.vector).decode("ascii"),
        }
        for i, one in enumerate(found)
    ]
    tokens = sum(one.tokens for one in found)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": rows, "model": serving.name, "usage": usage}


def floats(one: msg.Embedded) -> list[float]:
    values: list[float] = np.frombuffer(one.vector, "<f4").tolist()
    return values


async def embed_all(request: Request, serving: Serving, texts: list[str | list[int]]) -> list[msg.Embedded]:
    """The vector of each text, in order. Raises RequestError for an empty one, and when the client goes."""
    found = []
    for i, text in enumerate(texts):
        if not text:
            raise RequestError(f"input[{i}] is empty", param="input")
        if await request.is_disconnected():
            raise RequestError("the client has gone", status=GONE, code="client_closed")
        found.append(await serving.engine.embed(text))
    return found
