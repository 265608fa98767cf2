"""Vectors of texts in OpenAI's form: the mean of the model's last hidden states, of length 1.

A model that was trained to write gives usable vectors, though not those of a model trained for search. /info
names their dimension. Texts are embedded one by one, between the steps of running answers.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from edge.errors import RequestError
from edge.server.model_registry import served_model
from edge.server.openai_objects import IdPrompts, Ids, prompt_list
from edge.server.request_fields import MAX_INPUTS, Body
from edge.server.served_model import floats

router = APIRouter(prefix="/v1", tags=["openai"])


class Embeddings(Body):
    input: str | Ids | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)] | IdPrompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


@router.post("/embeddings", summary="Vectors of texts")
async def embeddings(request: Request, body: Embeddings) -> dict[str, Any]:
    model = await served_model(request, body.model)
    width = model.ready.embedding
    if body.dimensions not in (None, width):
        raise RequestError(
            f"this model's vectors have {width} dimensions and cannot be shortened", param="dimensions"
        )
    vectors = await model.embed(request, prompt_list(body.input))
    plain = body.encoding_format != "base64"
    rows = [
        {
            "object": "embedding",
            "index": i,
            "embedding": floats(vector) if plain else base64.b64encode(vector.vector).decode("ascii"),
        }
        for i, vector in enumerate(vectors)
    ]
    tokens = sum(vector.tokens for vector in vectors)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": rows, "model": model.name, "usage": usage}
