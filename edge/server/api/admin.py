"""Routes that change the server. They need an admin key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from edge.server.model_registry import registry_of
from edge.server.request_fields import Closed

router = APIRouter(prefix="/admin", tags=["admin"])


class ModelChoice(Closed):
    """model: an id; without one, the default model."""

    model: str | None = None


@router.post("/reload", summary="Load the artefact anew and swap it in")
async def reload(request: Request, body: ModelChoice) -> dict[str, Any]:
    """Running streams end on the engine that they began on; later requests get the new one."""
    registry = registry_of(request)
    before, after = await registry.reload(body.model)
    return {
        "model": registry.entry(body.model).name,
        "digest_before": before or None,
        "digest": after or None,
        "changed": before != after,
    }


@router.post("/unload", summary="Free a model's memory")
async def unload(request: Request, body: ModelChoice) -> dict[str, Any]:
    """The model is loaded again when it is asked for."""
    registry = registry_of(request)
    await registry.unload(body.model)
    return {"model": registry.entry(body.model).name, "status": "unloaded"}
